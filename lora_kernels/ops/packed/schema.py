"""Schemas, checks and fakes of the packed LoRA ops. x and dy are 2-D here; `api.py` flattens.

The P projections travel as flat lists: `a`, `b`, `scales` and `bias` hold one entry each, `meta`
five numbers each (`common.base.Meta`, the last three 0 where dense), and `base` each weight's
tensors one after the other: one of a dense weight, two or five of a 4-bit one, as its meta says.
`s` [M, Σ r_i] holds the projections' s_i side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_optional_vector,
    check_shape,
)
from lora_kernels.ops.common.philox import check_dropout
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.lora.schema import LoRALinearBackward, LoRALinearForward

META = len(Meta._fields)
T = TypeVar("T")


def split_base(base: Sequence[T], meta: Sequence[int]) -> list[tuple[list[T], list[int], slice]]:
    """Each projection's base and meta, as the ops on one projection take them, and the slice of
    `base` that holds its tensors. (`base` may also hold one flag or gradient for each tensor.)"""
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


def _fwd_flops(call: Any) -> int:
    sizes = zip(call.meta[::META], call.meta[1::META], call.a, strict=True)
    return sum(flops.lora_fwd(call.x[0], n, k, a[0]) for n, k, a in sizes)


def _bwd_flops(call: Any) -> int:
    want_x, wants = unpack_needs(call.needs, len(call.a))
    sizes = zip(call.meta[::META], call.meta[1::META], call.a, wants, strict=True)
    return sum(
        flops.lora_bwd(call.x[0], n, k, a[0], x=want_x, a=want[0], b=want[1], weight=want[3])
        for n, k, a, want in sizes
    )


@define("lora_packed_fwd", "(Tensor[] y, Tensor s)", flops=_fwd_flops)
class LoRAPackedForward(NamedTuple):
    """y_i [M, N_i] and s [M, Σ r_i]."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    bias: Sequence[Tensor | None]
    dropout_p: float
    seed: Tensor | None

    def check(self, widths: Sequence[int]) -> None:
        """Raise ValueError or TypeError that names the argument which does not fit.

        Args:
            widths: of each projection's input.
        """
        x, seed = self.x, self.seed
        check_dtype("x", x, FLOATS)
        if x.dim() == 0:
            raise ValueError("x: got shape [], expected [..., K]")
        check_dropout(self.dropout_p)
        if seed is not None:
            check_shape("seed", seed, [1])
            check_dtype("seed", seed, [torch.int64])
            check_device("seed", seed, x.device)
        for i, (base, meta, _) in enumerate(split_base(self.base, self.meta)):
            own = (self.a[i], self.b[i], self.bias[i])
            check_projection(i, x, widths[i], base, meta, *own, self.a[0].dtype)

    def first(self, count: int) -> LoRAPackedForward:
        """The first projections."""
        end = split_base(self.base, self.meta)[count - 1][2].stop
        return self._replace(
            base=self.base[:end],
            meta=self.meta[: count * META],
            a=self.a[:count],
            b=self.b[:count],
            scales=self.scales[:count],
            bias=self.bias[:count],
        )

    def backward(
        self, dy: Sequence[Tensor], s: Tensor, needs: Sequence[bool]
    ) -> LoRAPackedBackward:
        """The call of its backward."""
        return LoRAPackedBackward(
            dy,
            self.x,
            s,
            self.base,
            self.meta,
            self.a,
            self.b,
            self.scales,
            self.dropout_p,
            self.seed,
            needs,
        )

    def one(self, i: int, base: Sequence[Tensor], meta: Sequence[int]) -> LoRALinearForward:
        """Projection i alone."""
        return LoRALinearForward(
            self.x,
            base,
            meta,
            self.a[i],
            self.b[i],
            self.scales[i],
            self.bias[i],
            self.dropout_p,
            self.seed,
            None,
            None,
            stream=i,
        )

    def fake(self) -> tuple[list[Tensor], Tensor]:
        x, m = self.x, self.x.shape[0]
        s = x.new_empty((m, sum(t.shape[0] for t in self.a)), dtype=rank_dtype(x.dtype))
        return [x.new_empty((m, n)) for n in self.meta[::META]], s


@define(
    "lora_packed_bwd",
    "(Tensor dx, Tensor[] da, Tensor[] db, Tensor[] dbias, Tensor[] dw)",
    flops=_bwd_flops,
)
class LoRAPackedBackward(NamedTuple):
    """The gradients that `needs` (see `pack_needs`) asks for; the others are empty."""

    dy: Sequence[Tensor]
    x: Tensor
    s: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    dropout_p: float
    seed: Tensor | None
    needs: Sequence[bool]

    @property
    def want(self) -> tuple[bool, list[list[bool]]]:
        """dx, and (da, db, dbias, dw) of each projection."""
        return unpack_needs(self.needs, len(self.a))

    def one(
        self, i: int, base: Sequence[Tensor], meta: Sequence[int], s: Tensor
    ) -> LoRALinearBackward:
        """Projection i alone; s is its own."""
        want_x, wants = self.want
        want_a, want_b, want_bias, want_w = wants[i]
        return LoRALinearBackward(
            self.dy[i],
            self.x,
            s,
            base,
            meta,
            self.a[i],
            self.b[i],
            self.scales[i],
            self.dropout_p,
            self.seed,
            None,
            None,
            [want_x, want_a, want_b, want_bias, False, False, want_w],
            stream=i,
        )

    def fake(self) -> tuple[Any, ...]:
        x = self.x
        want_x, wants = self.want
        grads: list[list[Tensor]] = [[], [], [], []]
        for i, want in enumerate(wants):
            a, b = self.a[i], self.b[i]
            n, k = self.meta[i * META], self.meta[i * META + 1]
            shapes = (tuple(a.shape), tuple(b.shape), (n,), (n, k))
            dtypes = (a.dtype, b.dtype, x.dtype, x.dtype)
            for into, asked, shape, dtype in zip(grads, want, shapes, dtypes, strict=True):
                into.append(x.new_empty(shape if asked else (0,), dtype=dtype))
        return x.new_empty(tuple(x.shape) if want_x else (0,)), *grads
