"""Schemas, checks and fakes of the DoRA ops. x, dy, s, y and z are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.flops import Call
from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.dora.magnitude import norm_dtype
from lora_kernels.ops.lora.schema import check_lora_linear

GRADS = ("x", "lora_a", "lora_b", "magnitude", "bias", "weight")


def check_dora_linear(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise ValueError or TypeError that names the argument which does not fit."""
    check_lora_linear(x, base, meta, a, b, bias, dropout_p, seed, None, None)
    check_shape("magnitude", magnitude, [meta[0]])
    check_dtype("magnitude", magnitude, FLOATS)
    check_device("magnitude", magnitude, x.device)


def check_norm_sq(
    weight_norm_sq: Tensor | None, meta: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if weight_norm_sq is not None:
        check_shape("weight_norm_sq", weight_norm_sq, [meta[0]])
        check_dtype("weight_norm_sq", weight_norm_sq, [dtype])
        check_device("weight_norm_sq", weight_norm_sq, device)


def _norm_fake(
    weight_norm_sq: Tensor | None,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    return a.new_empty((meta[0],), dtype=norm_dtype(base))


def _fwd_fake(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = (x.shape[0], meta[0])
    s = x.new_empty((x.shape[0], a.shape[0]))
    return x.new_empty(size), s, x.new_empty(size if keep_z else (0,))


def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    y: Tensor | None,
    z: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    n, k = meta[0], meta[1]
    grads = (
        ((x.shape[0], k), x.dtype),
        (a.shape, a.dtype),
        (b.shape, b.dtype),
        ((n,), magnitude.dtype),
        ((n,), x.dtype),
        ((n, k), x.dtype),
    )
    return tuple(
        x.new_empty(shape if need else (0,), dtype=dtype)
        for need, (shape, dtype) in zip(needs, grads, strict=True)
    )


def _norm_flops(call: Call) -> int:
    n, k = call.meta[:2]
    return flops.product(n, k, call.a[0])  # B·A


def _drops(call: Call) -> bool:
    """Whether x and drop(x) differ, so that W meets both."""
    return call.seed is not None and threshold(call.dropout_p) > 0


def _fwd_flops(call: Call) -> int:
    m, (n, k) = call.x[0], call.meta[:2]
    return flops.lora_fwd(m, n, k, call.a[0]) + _drops(call) * flops.product(m, n, k)


def _bwd_flops(call: Call) -> int:
    m, (n, k) = call.x[0], call.meta[:2]
    wanted = dict(zip(GRADS, call.needs, strict=True))
    x, weight = wanted["x"], wanted["weight"]
    total = flops.lora_bwd(
        m, n, k, call.a[0], x=x, a=wanted["lora_a"], b=wanted["lora_b"], weight=weight
    )
    return total + _drops(call) * (x + weight) * flops.product(m, n, k)


# The norms of W + scale·B·A; without ‖W‖² of every row that is computed as well.
define(
    "dora_norm",
    "(Tensor? weight_norm_sq, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale) -> "
    "Tensor",
    _norm_fake,
    flops=_norm_flops,
)
# z = drop(x)·Wᵀ + scale·s·Bᵀ is returned if `keep_z`, else [0].
define(
    "dora_linear_fwd",
    "(Tensor x, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, Tensor magnitude, "
    "Tensor norm, Tensor? bias, float dropout_p, Tensor? seed, bool keep_z) -> "
    "(Tensor y, Tensor s, Tensor z)",
    _fwd_fake,
    flops=_fwd_flops,
)
# For dmagnitude: z, or the y of a forward without dropout and bias; neither, and z is made again.
define(
    "dora_linear_bwd",
    "(Tensor dy, Tensor x, Tensor s, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, "
    "Tensor magnitude, Tensor norm, float dropout_p, Tensor? seed, Tensor? y, Tensor? z, "
    "bool[] needs) -> (Tensor dx, Tensor da, Tensor db, Tensor dmagnitude, Tensor dbias, "
    "Tensor dw)",
    _bwd_fake,
    flops=_bwd_flops,
)
