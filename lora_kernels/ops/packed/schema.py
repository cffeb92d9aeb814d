"""Schemas, checks and fakes of the packed LoRA ops. x and dy are 2-D here; `api.py` flattens.

The P projections travel as flat lists: `a`, `b`, `scales` and `bias` hold one entry each, `meta`
five numbers each (`nf4.base.Meta`, the last three 0 for a dense weight), and `base` each weight's
tensors one after the other: one of a dense weight, two or five of a 4-bit one, as its meta says.
`s` [M, Σ r_i] holds the projections' s_i side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_kernels.dispatch.flops import Call
from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_optional_vector,
    check_shape,
)
from lora_kernels.ops.common.philox import check_dropout
from lora_kernels.ops.nf4.base import Meta

META = len(Meta._fields)
T = TypeVar("T")


def split_base(base: Sequence[T], meta: Sequence[int]) -> list[tuple[list[T], list[int], slice]]:
    """Each projection's base (or what stands for its tensors) and meta as the ops of one projection
    take them, and where the tensors stand in `base`."""
    parts, at = [], 0
    for i in range(0, len(meta), META):
        m = Meta(*meta[i : i + META])
        where = slice(at, at + (1 if m.is_dense else 5 if m.is_nested else 2))
        parts.append((list(base[where]), list(m[:2] if m.is_dense else m), where))
        at = where.stop
    return parts


def rank_slices(a: Sequence[Tensor]) -> Iterator[slice]:
    """The columns of `s` that belong to each projection."""
    at = 0
    for t in a:
        yield slice(at, at + t.shape[0])
        at += t.shape[0]


def pack_needs(
    x: bool,
    a: Sequence[bool],
    b: Sequence[bool],
    bias: Sequence[bool],
    weight: Sequence[bool],
) -> list[bool]:
    """`needs` of lora_packed_bwd: dx, then each projection's da, then db, dbias and dw."""
    return [x, *a, *b, *bias, *weight]


def unpack_needs(needs: Sequence[bool], projections: int) -> tuple[bool, list[list[bool]]]:
    """What `pack_needs` packed: dx, and the flags of (da, db, dbias, dw) for each projection."""
    return needs[0], [list(needs[1 + i :: projections]) for i in range(projections)]


def check_inputs(x: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    """Raise ValueError or TypeError unless x, dropout_p and seed make sense."""
    check_dtype("x", x, FLOATS)
    if x.dim() == 0:
        raise ValueError("x: got shape [], expected [..., K]")
    check_dropout(dropout_p)
    if seed is not None:
        check_shape("seed", seed, [1])
        check_dtype("seed", seed, [torch.int64])
        check_device("seed", seed, x.device)


def check_projection(
    i: int,
    x: Tensor,
    k: int,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    adapters: torch.dtype,
) -> None:
    """Raise ValueError or TypeError that names the argument of projection i which does not fit.

    Args:
        x: tells dtype and device; `k` is the width of this projection's input.
        adapters: the dtype of lora_a[0].
    """
    n = meta[0]
    weight, lora_a, lora_b = f"weights[{i}]", f"lora_a[{i}]", f"lora_b[{i}]"
    if meta[1] != k:
        raise ValueError(f"{weight}: got shape {list(meta[:2])}, expected [N, {k}]")
    check_device(weight, base[0], x.device)
    if len(base) == 1:
        check_dtype(weight, base[0], [x.dtype])
    check_shape(lora_a, a, ["r", k])
    if a.shape[0] < 1:
        raise ValueError(f"{lora_a}: got shape {list(a.shape)}, expected a rank of 1 or more")
    check_shape(lora_b, b, [n, a.shape[0]])
    for name, t in ((lora_a, a), (lora_b, b)):
        check_dtype(name, t, FLOATS)
        check_device(name, t, x.device)
        check_dtype(name, t, [adapters])
    check_optional_vector(f"biases[{i}]", bias, n, x, [x.dtype])


def _fwd_fake(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    m = x.shape[0]
    return [x.new_empty((m, n)) for n in meta[::META]], x.new_empty((m, sum(t.shape[0] for t in a)))


def _bwd_fake(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Any, ...]:
    want_x, wants = unpack_needs(needs, len(a))
    grads: list[list[Tensor]] = [[], [], [], []]
    for i, want in enumerate(wants):
        n, k = meta[i * META], meta[i * META + 1]
        shapes = (tuple(a[i].shape), tuple(b[i].shape), (n,), (n, k))
        dtypes = (a[i].dtype, b[i].dtype, x.dtype, x.dtype)
        for into, asked, shape, dtype in zip(grads, want, shapes, dtypes, strict=True):
            into.append(x.new_empty(shape if asked else (0,), dtype=dtype))
    return x.new_empty(tuple(x.shape) if want_x else (0,)), *grads


def _fwd_flops(call: Call) -> int:
    sizes = zip(call.meta[::META], call.meta[1::META], call.a, strict=True)
    return sum(flops.lora_fwd(call.x[0], n, k, a[0]) for n, k, a in sizes)


def _bwd_flops(call: Call) -> int:
    want_x, wants = unpack_needs(call.needs, len(call.a))
    sizes = zip(call.meta[::META], call.meta[1::META], call.a, wants, strict=True)
    return sum(
        flops.lora_bwd(call.x[0], n, k, a[0], x=want_x, a=want[0], b=want[1], weight=want[3])
        for n, k, a, want in sizes
    )


define(
    "lora_packed_fwd",
    "(Tensor x, Tensor[] base, int[] meta, Tensor[] a, Tensor[] b, float[] scales, "
    "Tensor?[] bias, float dropout_p, Tensor? seed) -> (Tensor[] y, Tensor s)",
    _fwd_fake,
    flops=_fwd_flops,
)
define(
    "lora_packed_bwd",
    "(Tensor[] dy, Tensor x, Tensor s, Tensor[] base, int[] meta, Tensor[] a, Tensor[] b, "
    "float[] scales, float dropout_p, Tensor? seed, bool[] needs) -> "
    "(Tensor dx, Tensor[] da, Tensor[] db, Tensor[] dbias, Tensor[] dw)",
    _bwd_fake,
    flops=_bwd_flops,
)
