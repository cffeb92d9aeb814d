"""LoRA over a dense or 4-bit base in plain PyTorch: the oracle of every other backend.

Everything is computed in x's dtype, except rank-wide results (`ops/common/rank.py`) and the sums of
the adapters' gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.common.philox import keep_mask, keep_scale, threshold
from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.lora.schema import DropoutMask, LoRALinearBackward, LoRALinearForward
from lora_kernels.ops.nf4.reference import dense_weight


def drop(x: Tensor, p: float, seed: Tensor | None, stream: int = 0) -> Tensor:
    """x where the mask keeps it, scaled by 1 / (1 - p); 0 elsewhere."""
    if threshold(p) == 0 or seed is None:
        return x
    kept = keep_mask(seed, x.shape[0], x.shape[1], p, stream)
    return (x * keep_scale(p)).masked_fill(~kept, 0)


def shrink(left: Tensor, right: Tensor) -> Tensor:
    """left·right [M, R], as s and ds are kept."""
    rank = rank_dtype(left.dtype)
    return rank_value(left.to(rank) @ right.to(rank), left.dtype)


@register_reference
def lora_linear_fwd(c: LoRALinearForward) -> tuple[Tensor, Tensor]:
    """s = drop(x)·Aᵀ;  y = x·Wᵀ + g ∘ (scale·(d ∘ s)·Bᵀ) + bias."""
    x, dtype, rank = c.x, c.x.dtype, rank_dtype(c.x.dtype)
    s = shrink(drop(x, c.dropout_p, c.seed, c.stream), c.a.to(dtype).T)  # [M, R]
    t = s if c.rank_diag is None else s * c.rank_diag.to(rank)
    z = c.scale * (t @ c.b.to(dtype).to(rank).T)  # [M, N]
    if c.out_diag is not None:
        z = z * c.out_diag.to(rank)
    y = torch.nn.functional.linear(x, dense_weight(c.base, c.meta, dtype), c.bias)
    return (y + z).to(dtype), s


@register_reference
def lora_linear_bwd(c: LoRALinearBackward) -> tuple[Tensor, ...]:
    """The derivation stands in `api.py`."""
    x, dy, a, scale, needs, dtype = c.x, c.dy, c.a, c.scale, c.needs, c.x.dtype
    rank, grads = rank_dtype(dtype), [x.new_empty(0) for _ in needs]
    d = x.new_ones(a.shape[0], dtype=rank) if c.rank_diag is None else c.rank_diag.to(rank)
    g = x.new_ones(c.meta[0], dtype=rank) if c.out_diag is None else c.out_diag.to(rank)
    b_cast = c.b.to(dtype).to(rank)
    ds = rank_value(scale * d * ((g * dy) @ b_cast), dtype)  # [M, R]
    # The adapters' gradients are summed in the adapters' dtype: fp32 under 16-bit activations.
    wide = torch.promote_types(rank, a.dtype)
    dys = dy.to(wide).T @ c.s.to(wide)  # [N, R]
    mask = (c.dropout_p, c.seed, c.stream)
    if needs[0]:
        w = dense_weight(c.base, c.meta, dtype)
        grads[0] = dy @ w + drop(ds @ a.to(dtype).to(rank), *mask)
    if needs[1]:
        grads[1] = ds.to(wide).T @ drop(x.to(wide), *mask)
    if needs[2]:
        grads[2] = scale * g[:, None] * dys * d
    if needs[3]:
        grads[3] = dy.sum(0)
    if needs[4]:
        grads[4] = scale * (g[:, None] * b_cast * dys).sum(0)
    if needs[5]:
        grads[5] = scale * (b_cast * d * dys).sum(1)
    if needs[6]:
        grads[6] = dy.T @ x
    return tuple(g.to(t) for g, t in zip(grads, c.dtypes, strict=True))


@register_reference
def dropout_mask(c: DropoutMask) -> Tensor:
    """Whether each element is kept."""
    return keep_mask(*c)
