"""LoRA over a dense or 4-bit base in plain PyTorch: the oracle of every other backend.

Everything is computed in x's dtype, but for the sums of the adapters' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import Implementation, register
from lora_kernels.ops.common.philox import keep_mask, keep_scale, threshold
from lora_kernels.ops.nf4.reference import dense_weight


def drop(x: Tensor, p: float, seed: Tensor | None, stream: int = 0) -> Tensor:
    """x where the mask keeps it, scaled by 1 / (1 - p); 0 elsewhere."""
    if threshold(p) == 0 or seed is None:
        return x
    kept = keep_mask(seed, x.shape[0], x.shape[1], p, stream)
    return (x * keep_scale(p)).masked_fill(~kept, 0)


def lora_linear_fwd(
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
    """s = drop(x)·Aᵀ;  y = x·Wᵀ + g ∘ (scale·(d ∘ s)·Bᵀ) + bias."""
    dtype = x.dtype
    s = drop(x, dropout_p, seed, stream) @ a.to(dtype).T  # [M, R]
    t = s if rank_diag is None else s * rank_diag.to(dtype)
    z = scale * (t @ b.to(dtype).T)  # [M, N]
    if out_diag is not None:
        z = z * out_diag.to(dtype)
    y = torch.nn.functional.linear(x, dense_weight(base, meta, dtype), bias)
    return y + z, s


def lora_linear_bwd(
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
    """The derivation stands in `api.py`."""
    dtype = x.dtype
    grads = [x.new_empty(0) for _ in needs]
    d = x.new_ones(a.shape[0]) if rank_diag is None else rank_diag.to(dtype)
    g = x.new_ones(meta[0]) if out_diag is None else out_diag.to(dtype)
    b_cast = b.to(dtype)
    ds = scale * d * ((g * dy) @ b_cast)  # [M, R]
    # The adapters' gradients are summed in the adapters' dtype: fp32 under 16-bit activations.
    wide = torch.promote_types(dtype, a.dtype)
    dys = dy.to(wide).T @ s.to(wide)  # [N, R]
    if needs[0]:
        w = dense_weight(base, meta, dtype)
        grads[0] = dy @ w + drop(ds @ a.to(dtype), dropout_p, seed, stream)
    if needs[1]:
        grads[1] = ds.to(wide).T @ drop(x.to(wide), dropout_p, seed, stream)
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
    dtypes = (dtype, a.dtype, b.dtype, dtype, _of(rank_diag, dtype), _of(out_diag, dtype), dtype)
    return tuple(g.to(t) for g, t in zip(grads, dtypes, strict=True))


def _of(t: Tensor | None, default: torch.dtype) -> torch.dtype:
    return default if t is None else t.dtype


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> Tensor:
    return keep_mask(seed, rows, cols, p, stream)


def _accepts(*args: object, **kwargs: object) -> str | None:
    return None


for _op in (lora_linear_fwd, lora_linear_bwd, dropout_mask):
    register(_op.__name__, Implementation("reference", _op, _accepts))
