"""Schemas, checks and fakes of the LoRA ops. x, dy and s are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.base import check_base, check_input
from lora_kernels.ops.common.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_optional_vector,
    check_shape,
)
from lora_kernels.ops.common.philox import check_dropout
from lora_kernels.ops.common.rank import rank_dtype

GRADS = ("x", "lora_a", "lora_b", "bias", "rank_diag", "out_diag", "weight")


def _fwd_flops(call: Any) -> int:
    n, k = call.meta[:2]
    return flops.lora_fwd(call.x[0], n, k, call.a[0])


def _bwd_flops(call: Any) -> int:
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


@define("lora_linear_fwd", "(Tensor y, Tensor s)", flops=_fwd_flops)
class LoRALinearForward(NamedTuple):
    """y [M, N] = x·Wᵀ + out_diag ∘ (scale·(rank_diag ∘ s)·Bᵀ) + bias, s [M, R] = drop(x)·Aᵀ."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None
    dropout_p: float
    seed: Tensor | None
    rank_diag: Tensor | None
    out_diag: Tensor | None
    stream: int = 0

    def check(self) -> None:
        """Raise ValueError or TypeError that names the argument which does not fit."""
        x, meta, a, b = self.x, self.meta, self.a, self.b
        n, k = meta[0], meta[1]
        check_input(x, k)
        check_base(x, self.base, meta)
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
        check_optional_vector("bias", self.bias, n, x, [x.dtype])
        check_optional_vector("rank_diag", self.rank_diag, a.shape[0], x)
        check_optional_vector("out_diag", self.out_diag, n, x)
        check_dropout(self.dropout_p)
        if self.seed is not None:
            check_shape("seed", self.seed, [1])
            check_dtype("seed", self.seed, [torch.int64])
            check_device("seed", self.seed, x.device)

    def fake(self) -> tuple[Tensor, Tensor]:
        x = self.x
        s = x.new_empty((x.shape[0], self.a.shape[0]), dtype=rank_dtype(x.dtype))
        return x.new_empty((x.shape[0], self.meta[0])), s

    def backward(self, dy: Tensor, s: Tensor, needs: Sequence[bool]) -> LoRALinearBackward:
        """The call of its backward."""
        return LoRALinearBackward(
            dy,
            self.x,
            s,
            self.base,
            self.meta,
            self.a,
            self.b,
            self.scale,
            self.dropout_p,
            self.seed,
            self.rank_diag,
            self.out_diag,
            needs,
            self.stream,
        )


@define(
    "lora_linear_bwd",
    "(Tensor dx, Tensor da, Tensor db, Tensor dbias, Tensor drank_diag, Tensor dout_diag, "
    "Tensor dw)",
    flops=_bwd_flops,
)
class LoRALinearBackward(NamedTuple):
    """The gradients that `needs` asks for, in the order of `GRADS`; the others are empty."""

    dy: Tensor
    x: Tensor
    s: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float
    seed: Tensor | None
    rank_diag: Tensor | None
    out_diag: Tensor | None
    needs: Sequence[bool]
    stream: int = 0

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The gradients' dtypes."""
        x, rank, out = self.x.dtype, self.rank_diag, self.out_diag
        return (
            x,
            self.a.dtype,
            self.b.dtype,
            x,
            x if rank is None else rank.dtype,
            x if out is None else out.dtype,
            x,
        )

    def fake(self) -> tuple[Tensor, ...]:
        n, k = self.meta[0], self.meta[1]
        m, r = self.x.shape[0], self.a.shape[0]
        shapes = ((m, k), (r, k), (n, r), (n,), (r,), (n,), (n, k))
        return tuple(
            self.x.new_empty(shape if need else (0,), dtype=dtype)
            for need, shape, dtype in zip(self.needs, shapes, self.dtypes, strict=True)
        )


@define("dropout_mask", "Tensor", flops=None)
class DropoutMask(NamedTuple):
    """The boolean keep mask [rows, cols]."""

    seed: Tensor
    rows: int
    cols: int
    p: float
    stream: int

    def fake(self) -> Tensor:
        return self.seed.new_empty((self.rows, self.cols), dtype=torch.bool)
