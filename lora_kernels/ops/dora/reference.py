"""DoRA over a dense or 4-bit base in plain PyTorch: the oracle of every other backend.

Everything is computed in x's dtype, except rank-wide results, z before the magnitude
(`ops/common/rank.py`), the norm and the sums of the adapter's gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.dora.magnitude import (
    inverse_norm,
    norm_dtype,
    output_scale,
    without_autocast,
)
from lora_kernels.ops.dora.schema import DoRALinearBackward, DoRALinearForward, DoRANorm
from lora_kernels.ops.lora.reference import drop, shrink
from lora_kernels.ops.nf4.reference import dense_weight


@register_reference
@without_autocast
def dora_norm(c: DoRANorm) -> Tensor:
    """norm[n] = ‖W[n] + scale·B[n]·A‖, by its definition."""
    dtype = norm_dtype(c.base)
    w = dense_weight(c.base, c.meta, dtype).to(dtype)
    return torch.linalg.vector_norm(w + c.scale * (c.b.to(dtype) @ c.a.to(dtype)), dim=1)


@register_reference
@without_autocast
def dora_linear_fwd(c: DoRALinearForward) -> tuple[Tensor, Tensor, Tensor]:
    """s = xd·Aᵀ;  z = xd·Wᵀ + scale·s·Bᵀ;  y = m̂ ∘ z + (x − xd)·Wᵀ + bias,  xd = drop(x);
    u = z / norm."""
    x, dtype, rank = c.x, c.x.dtype, rank_dtype(c.x.dtype)
    w = dense_weight(c.base, c.meta, dtype)
    m = output_scale(c.magnitude, c.norm).to(rank)
    xd = drop(x, c.dropout_p, c.seed)
    s = shrink(xd, c.a.to(dtype).T)  # [M, R]
    z = linear(xd.to(rank), w.to(rank)) + c.scale * (s @ c.b.to(dtype).to(rank).T)  # [M, N]
    y = m * z
    if xd is not x:
        y = y + linear(x - xd, w)
    if c.bias is not None:
        y = y + c.bias
    u = (z * inverse_norm(c.norm)).to(dtype) if c.keep_u else x.new_empty(0)
    return y.to(dtype), s, u


@register_reference
@without_autocast
def dora_linear_bwd(c: DoRALinearBackward) -> tuple[Tensor, ...]:
    """The derivation stands in `api.py`."""
    x, dy, s, needs, dtype = c.x, c.dy, c.s, c.needs, c.x.dtype
    rank = rank_dtype(dtype)
    grads = [x.new_empty(0) for _ in needs]
    w = dense_weight(c.base, c.meta, dtype)
    xd = drop(x, c.dropout_p, c.seed)
    dz = output_scale(c.magnitude, c.norm).to(dtype) * dy  # [M, N]
    ds = rank_value(c.scale * (dz.to(rank) @ c.b.to(dtype).to(rank)), dtype)  # [M, R]
    # The adapter's gradients are summed in its own dtype: fp32 under 16-bit activations.
    wide = torch.promote_types(rank, c.a.dtype)
    if needs[0]:
        through = dz @ w + ds @ c.a.to(dtype).to(rank)
        if xd is x:
            grads[0] = through
        else:
            beside = dy @ w
            grads[0] = beside + drop(through - beside, c.dropout_p, c.seed)
    if needs[1]:
        grads[1] = ds.to(wide).T @ xd.to(wide)
    if needs[2]:
        grads[2] = c.scale * (dz.to(wide).T @ s.to(wide))
    if needs[3]:
        assert c.u is not None
        wide = torch.promote_types(dtype, c.norm.dtype)
        grads[3] = (dy.to(wide) * c.u.to(wide)).sum(0)
    if needs[4]:
        grads[4] = dy.sum(0)
    if needs[5]:
        grads[5] = dz.T @ xd + dy.T @ (x - xd)
    return tuple(g.to(t) for g, t in zip(grads, c.dtypes, strict=True))
