"""Schemas, checks and fakes of the DoRA ops. x, dy, s, y and u are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.dora.magnitude import norm_dtype
from lora_kernels.ops.lora.schema import LoRALinearForward

GRADS = ("x", "lora_a", "lora_b", "magnitude", "bias", "weight")


def check_magnitude(magnitude: Tensor, meta: Sequence[int], device: torch.device) -> None:
    check_shape("magnitude", magnitude, [meta[0]])
    check_dtype("magnitude", magnitude, FLOATS)
    check_device("magnitude", magnitude, device)


def check_norm_sq(
    weight_norm_sq: Tensor | None, meta: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if weight_norm_sq is not None:
        check_shape("weight_norm_sq", weight_norm_sq, [meta[0]])
        check_dtype("weight_norm_sq", weight_norm_sq, [dtype])
        check_device("weight_norm_sq", weight_norm_sq, device)


def _norm_flops(call: Any) -> int:
    n, k = call.meta[:2]
    return flops.product(n, k, call.a[0])  # B·A


def _drops(call: Any) -> bool:
    """Whether x and drop(x) differ, so that W meets both."""
    return call.seed is not None and threshold(call.dropout_p) > 0


def _fwd_flops(call: Any) -> int:
    m, (n, k) = call.x[0], call.meta[:2]
    return flops.lora_fwd(m, n, k, call.a[0]) + _drops(call) * flops.product(m, n, k)


def _bwd_flops(call: Any) -> int:
    m, (n, k) = call.x[0], call.meta[:2]
    wanted = dict(zip(GRADS, call.needs, strict=True))
    x, weight = wanted["x"], wanted["weight"]
    total = flops.lora_bwd(
        m, n, k, call.a[0], x=x, a=wanted["lora_a"], b=wanted["lora_b"], weight=weight
    )
    return total + _drops(call) * (x + weight) * flops.product(m, n, k)


@define("dora_norm", "Tensor", flops=_norm_flops)
class DoRANorm(NamedTuple):
    """The norms [N] of W + scale·B·A; without ‖W‖² of every row that is computed as well."""

    weight_norm_sq: Tensor | None
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float

    def fake(self) -> Tensor:
        return self.a.new_empty((self.meta[0],), dtype=norm_dtype(self.base))


@define("dora_linear_fwd", "(Tensor y, Tensor s, Tensor u)", flops=_fwd_flops)
class DoRALinearForward(NamedTuple):
    """y, s and, if `keep_u`, u = (drop(x)·Wᵀ + scale·s·Bᵀ) / norm, else [0]."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor
    norm: Tensor
    bias: Tensor | None
    dropout_p: float
    seed: Tensor | None
    keep_u: bool

    @property
    def lora(self) -> LoRALinearForward:
        """The same layer without its magnitude."""
        own = (self.x, self.base, self.meta, self.a, self.b, self.scale, self.bias)
        return LoRALinearForward(*own, self.dropout_p, self.seed, None, None)

    def fake(self) -> tuple[Tensor, Tensor, Tensor]:
        x, size = self.x, (self.x.shape[0], self.meta[0])
        s = x.new_empty((x.shape[0], self.a.shape[0]), dtype=rank_dtype(x.dtype))
        return x.new_empty(size), s, x.new_empty(size if self.keep_u else (0,))

    def backward(
        self, dy: Tensor, s: Tensor, u: Tensor | None, needs: Sequence[bool]
    ) -> DoRALinearBackward:
        """The call of its backward."""
        return DoRALinearBackward(
            dy,
            self.x,
            s,
            self.base,
            self.meta,
            self.a,
            self.b,
            self.scale,
            self.magnitude,
            self.norm,
            self.dropout_p,
            self.seed,
            u,
            needs,
        )


@define(
    "dora_linear_bwd",
    "(Tensor dx, Tensor da, Tensor db, Tensor dmagnitude, Tensor dbias, Tensor dw)",
    flops=_bwd_flops,
)
class DoRALinearBackward(NamedTuple):
    """The gradients that `needs` asks for, in the order of `GRADS`; the others are empty. u is for
    dmagnitude, and may be absent where that is not asked."""

    dy: Tensor
    x: Tensor
    s: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor
    norm: Tensor
    dropout_p: float
    seed: Tensor | None
    u: Tensor | None
    needs: Sequence[bool]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The gradients' dtypes."""
        x = self.x.dtype
        return (x, self.a.dtype, self.b.dtype, self.magnitude.dtype, x, x)

    def fake(self) -> tuple[Tensor, ...]:
        """A tensor for each gradient, [0] where it is not asked for."""
        n, k = self.meta[0], self.meta[1]
        m, r = self.x.shape[0], self.a.shape[0]
        shapes = ((m, k), (r, k), (n, r), (n,), (n,), (n, k))
        return tuple(
            self.x.new_empty(shape if need else (0,), dtype=dtype)
            for need, shape, dtype in zip(self.needs, shapes, self.dtypes, strict=True)
        )
