"""Schemas, checks and fakes of the LoRA ops. x, dy and s are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence

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
from lora_kernels.ops.nf4.base import check_base, check_input

GRADS = ("x", "lora_a", "lora_b", "bias", "rank_diag", "out_diag", "weight")


def check_lora_linear(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
) -> None:
    """Raise ValueError or TypeError that names the argument which does not fit."""
    n, k = meta[0], meta[1]
    check_input(x, k)
    check_base(x, base, meta)
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(f"lora_a: got shape {list(a.shape)}, expected [r, {k}]")
    if a.shape[0] < 1:
        raise ValueError(f"lora_a: got shape {list(a.shape)}, expected a rank of 1 or more")
    check_shape("lora_b", b, [n, a.shape[0]])
    for name, t in (("lora_a", a), ("lora_b", b)):
        check_dtype(name, t, FLOATS)
        check_device(name, t, x.device)
    if a.dtype != b.dtype:
        raise TypeError(f"lora_b: got dtype {b.dtype}, expected {a.dtype} as lora_a has")
    check_optional_vector("bias", bias, n, x, [x.dtype])
    check_optional_vector("rank_diag", rank_diag, a.shape[0], x)
    check_optional_vector("out_diag", out_diag, n, x)
    check_dropout(dropout_p)
    if seed is not None:
        check_shape("seed", seed, [1])
        check_dtype("seed", seed, [torch.int64])
        check_device("seed", seed, x.device)


def _fwd_fake(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], meta[0])), x.new_empty((x.shape[0], a.shape[0]))


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    needs: Sequence[bool],
    stream: int = 0,
) -> tuple[Tensor, ...]:
    n, k = meta[0], meta[1]
    grads = (
        ((x.shape[0], k), x.dtype),
        (a.shape, a.dtype),
        (b.shape, b.dtype),
        ((n,), x.dtype),
        ((a.shape[0],), x.dtype if rank_diag is None else rank_diag.dtype),
        ((n,), x.dtype if out_diag is None else out_diag.dtype),
        ((n, k), x.dtype),
    )
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for need, (shape, dtype) in zip(needs, grads, strict=True)
    )


def _mask_fake(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.bool)


def _fwd_flops(call: Call) -> int:
    n, k = call.meta[:2]
    return flops.lora_fwd(call.x[0], n, k, call.a[0])


def _bwd_flops(call: Call) -> int:
    wanted = dict(zip(GRADS, call.needs, strict=True))
    n, k = call.meta[:2]
    return flops.lora_bwd(
        call.x[0],
        n,
        k,
        call.a[0],
        x=wanted["x"],
        a=wanted["lora_a"],
        b=wanted["lora_b"],
        weight=wanted["weight"],
        ds=wanted["rank_diag"],
    )


define(
    "lora_linear_fwd",
    "(Tensor x, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, Tensor? bias, "
    "float dropout_p, Tensor? seed, Tensor? rank_diag, Tensor? out_diag, int stream=0) -> "
    "(Tensor y, Tensor s)",
    _fwd_fake,
    flops=_fwd_flops,
)
define(
    "lora_linear_bwd",
    "(Tensor dy, Tensor x, Tensor s, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, "
    "float dropout_p, Tensor? seed, Tensor? rank_diag, Tensor? out_diag, bool[] needs, "
    "int stream=0) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias, Tensor drank_diag, "
    "Tensor dout_diag, Tensor dw)",
    _bwd_fake,
    flops=_bwd_flops,
)
define(
    "dropout_mask",
    "(Tensor seed, int rows, int cols, float p, int stream) -> Tensor",
    _mask_fake,
    flops=None,
)
