"""DoRA over a dense or 4-bit base in plain PyTorch: the oracle of every other backend.

Everything is computed in x's dtype, but for the norm and the sums of the adapter's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.dispatch.registry import Implementation, register
from lora_kernels.ops.dora.magnitude import (
    inverse_norm,
    norm_dtype,
    output_scale,
    without_autocast,
)
from lora_kernels.ops.lora.reference import drop
from lora_kernels.ops.nf4.reference import dense_weight


@without_autocast
def dora_norm(
    weight_norm_sq: Tensor | None,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor:
    """norm[n] = ‖W[n] + scale·B[n]·A‖, by its definition."""
    dtype = norm_dtype(base)
    w = dense_weight(base, meta, dtype).to(dtype)
    return torch.linalg.vector_norm(w + scale * (b.to(dtype) @ a.to(dtype)), dim=1)


@without_autocast
def dora_linear_fwd(
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
    """s = xd·Aᵀ;  z = xd·Wᵀ + scale·s·Bᵀ;  y = m̂ ∘ z + (x − xd)·Wᵀ + bias,  xd = drop(x)."""
    dtype = x.dtype
    w = dense_weight(base, meta, dtype)
    m = output_scale(magnitude, norm).to(dtype)
    xd = drop(x, dropout_p, seed)
    s = xd @ a.to(dtype).T  # [M, R]
    z = linear(xd, w) + scale * (s @ b.to(dtype).T)  # [M, N]
    y = m * z
    if xd is not x:
        y = y + linear(x - xd, w)
    if bias is not None:
        y = y + bias
    return y, s, z if keep_z else x.new_empty(0)


@without_autocast
def dora_linear_bwd(
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
    z: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The derivation stands in `api.py`."""
    dtype = x.dtype
    grads = [x.new_empty(0) for _ in needs]
    w = dense_weight(base, meta, dtype)
    xd = drop(x, dropout_p, seed)
    dz = output_scale(magnitude, norm).to(dtype) * dy  # [M, N]
    ds = scale * (dz @ b.to(dtype))  # [M, R]
    # The adapter's gradients are summed in its own dtype: fp32 under 16-bit activations.
    wide = torch.promote_types(dtype, a.dtype)
    if needs[0]:
        through = dz @ w + ds @ a.to(dtype)
        if xd is x:
            grads[0] = through
        else:
            beside = dy @ w
            grads[0] = beside + drop(through - beside, dropout_p, seed)
    if needs[1]:
        grads[1] = ds.to(wide).T @ xd.to(wide)
    if needs[2]:
        grads[2] = scale * (dz.to(wide).T @ s.to(wide))
    if needs[3]:
        assert z is not None
        wide = torch.promote_types(dtype, norm.dtype)
        grads[3] = (dy.to(wide) * z.to(wide)).sum(0) * inverse_norm(norm)
    if needs[4]:
        grads[4] = dy.sum(0)
    if needs[5]:
        grads[5] = dz.T @ xd + dy.T @ (x - xd)
    dtypes = (dtype, a.dtype, b.dtype, magnitude.dtype, dtype, dtype)
    return tuple(g.to(t) for g, t in zip(grads, dtypes, strict=True))


def _accepts(*args: object, **kwargs: object) -> str | None:
    return None


for _op in (dora_norm, dora_linear_fwd, dora_linear_bwd):
    register(_op.__name__, Implementation("reference", _op, _accepts))
