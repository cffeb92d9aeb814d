"""DoRA made of the compiled LoRA and NF4 kernels and elementwise torch operations.

The norm is factored, so that W + scale·B·A is never made, and a 4-bit W is decoded only inside the
kernels. Elementwise work over [M, N] or [M, K] is done a few rows at a time, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_kernels.dispatch.op import NATIVE_NAMESPACE, Implementation
from lora_kernels.dispatch.registry import register
from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.native import EMPTY, refuse_device, refuse_dtypes, refuse_linear
from lora_kernels.ops.common.philox import keep_scale, threshold
from lora_kernels.ops.dora.magnitude import (
    inverse_norm,
    output_scale,
    row_blocks,
    row_norms,
    rows_at_once,
    without_autocast,
)
from lora_kernels.ops.dora.schema import DoRALinearBackward, DoRALinearForward, DoRANorm

# Half of fp16's largest number.
_MOST_Z = 32752.0


def _native(op: str, *args: Any) -> Any:
    return getattr(getattr(torch.ops, NATIVE_NAMESPACE), op).default(*args)


@without_autocast
def dora_norm(c: DoRANorm) -> Tensor:
    """norm² = ‖W‖² + 2c·⟨B, W·Aᵀ⟩ + c²·B·(A·Aᵀ)·Bᵀ, row by row: one read of W, summed in fp32.

    The rest is small ([N, R] and [R, R]) and in fp64, so that the result is as exact as ‖W‖² is.
    """
    base, meta, a, b, scale, weight_norm_sq = c.base, c.meta, c.a, c.b, c.scale, c.weight_norm_sq
    a32 = a.float()
    if weight_norm_sq is None:
        # Both sums over W from one pass: a block of rows stays in the cache.
        parts = [(w @ a32.T, row_norms(w)) for w in row_blocks(base, Meta(*meta))]
        wa, weight_norm_sq = (torch.cat(part) for part in zip(*parts, strict=True))
    elif len(base) > 1:
        wa = _native("nf4_linear_fwd", a32, base, meta, None).T  # [N, R]
    elif base[0].dtype == torch.float32:
        wa = base[0] @ a32.T
    else:
        wa = torch.cat([w.float() @ a32.T for w in base[0].split(rows_at_once(meta[1]))])
    a64, b64, own = a.double(), b.double(), weight_norm_sq.double()
    cross = 2 * scale * (b64 * wa.double()).sum(1)
    branch = scale * scale * ((b64 @ (a64 @ a64.T)) * b64).sum(1)
    squared = own + cross + branch
    # Where W and cBA nearly cancel, the rounding of the terms would show: there the norm is
    # computed by its definition.
    opposed = squared < (own + branch) / 4
    if bool(opposed.any()):  # on a CPU this waits for nothing
        for rows in opposed.nonzero()[:, 0].split(rows_at_once(meta[1])):
            total = _base_rows(rows, base, meta).double() + scale * (b64[rows] @ a64)
            squared[rows] = total.square().sum(1)
    return squared.sqrt().to(weight_norm_sq.dtype)


def _base_rows(rows: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> Tensor:
    """Some rows of W. Those of a 4-bit W are products with rows of the identity matrix, which are
    exact."""
    if len(base) == 1:
        return base[0][rows]
    chosen = torch.zeros(rows.shape[0], meta[0], device=rows.device)
    chosen.scatter_(1, rows[:, None], 1.0)
    return _native("nf4_linear_bwd", chosen, base, meta)


@without_autocast
def dora_linear_fwd(c: DoRALinearForward) -> tuple[Tensor, Tensor, Tensor]:
    """z = xd·Wᵀ + scale·s·Bᵀ in one kernel;  y = m̂ ∘ z + (x − xd)·Wᵀ + bias,  xd = drop(x);
    u = z / norm."""
    x = c.x
    mask = _mask(x, c.dropout_p, c.seed)
    xd = _drop(x, mask, c.dropout_p)
    rows = _row_scale(xd, c.norm)
    held = xd if rows is None else (xd / rows).to(x.dtype)
    branch = c.lora._replace(x=held, bias=None, dropout_p=0.0, seed=None)
    z, s = _native("lora_linear_fwd", *branch)
    if rows is not None:
        s *= rows
    rest = None if mask is None else _base_linear(x - xd, c.base, c.meta)
    y = torch.empty_like(z) if c.keep_u else z
    m, inverse = output_scale(c.magnitude, c.norm), inverse_norm(c.norm)
    for out, part, beside, by in _row_blocks(c.meta[0], y, z, rest, rows):
        whole = part.float() if by is None else part * by
        block = whole * m
        if beside is not None:
            block += beside
        if c.bias is not None:
            block += c.bias
        out.copy_(block)
        if c.keep_u:
            part.copy_(whole.mul_(inverse))
    return y, s, z if c.keep_u else x.new_empty(0)


def _row_scale(x: Tensor, norm: Tensor) -> Tensor | None:
    """Powers of two [M, 1] in fp32 for rows of fp16 x whose |z| <= ‖x[m]‖·norm[n] fp16 may not
    hold; None where it holds all."""
    if x.dtype != torch.float16 or norm.numel() == 0:
        return None
    most = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32, keepdim=True) * norm.max()
    if not bool((most > _MOST_Z).any()):  # on a CPU this waits for nothing
        return None
    return torch.exp2(torch.log2(most / _MOST_Z).ceil().clamp(min=0))


@without_autocast
def dora_linear_bwd(c: DoRALinearBackward) -> tuple[Tensor, ...]:
    """LoRA's own backward of dz = m̂ ∘ dy at xd; what the mask takes from x is added to dx."""
    dy, x, base, meta, needs, norm = c.dy, c.x, c.base, c.meta, c.needs, c.norm
    n, k = meta[0], meta[1]
    mask = _mask(x, c.dropout_p, c.seed)
    xd = _drop(x, mask, c.dropout_p)
    dx, da, db, dmagnitude, dbias, dw = (x.new_empty(0, dtype=dtype) for dtype in c.dtypes)
    if needs[0] or needs[1] or needs[2] or needs[5]:
        m = output_scale(c.magnitude, norm)
        dz = dy.new_empty((x.shape[0], n))
        for out, part in _row_blocks(n, dz, dy):
            out.copy_(part * m)
        asked = [needs[0], needs[1], needs[2], False, False, False, needs[5]]
        dx, da, db, *_, dw = _native(
            "lora_linear_bwd",
            *(dz, xd, c.s, base, meta, c.a, c.b, c.scale, 0.0, None, None, None, asked),
        )
        if mask is not None and needs[0]:
            kept = keep_scale(c.dropout_p)
            beside = _base_linear_bwd(dy, base, meta)
            for out, other, keep in _row_blocks(k, dx, beside, mask):
                both = out.float() * kept + other.float() * (1 - kept)
                out.copy_(torch.where(keep, both, other))
        if mask is not None and needs[5]:
            dw += dy.T @ (x - xd)
    if needs[3]:
        assert c.u is not None
        dmagnitude = _column_dot(dy, c.u).to(c.magnitude.dtype)
    if needs[4]:
        dbias = dy.sum(0)
    return dx, da, db, dmagnitude, dbias, dw


def _base_linear(x: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> Tensor:
    if len(base) == 1:
        return linear(x, base[0])
    return _native("nf4_linear_fwd", x, base, meta, None)


def _base_linear_bwd(dy: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> Tensor:
    return dy @ base[0] if len(base) == 1 else _native("nf4_linear_bwd", dy, base, meta)


def _mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor | None:
    if seed is None or threshold(p) == 0:
        return None
    return _native("dropout_mask", seed, x.shape[0], x.shape[1], p, 0)


def _drop(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return x if mask is None else (x * keep_scale(p)).masked_fill_(~mask, 0)


def _column_dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ_m left ∘ right [N], in fp32."""
    total = torch.zeros(left.shape[1], device=left.device)
    for part, other in _row_blocks(left.shape[1], left, right):
        total += (part.float() * other.float()).sum(0)
    return total


def _row_blocks(columns: int, *matrices: Tensor | None) -> Iterator[Any]:
    """The matrices in blocks of the same rows; None stays None."""
    step = rows_at_once(columns)
    first = next(t for t in matrices if t is not None)
    for row in range(0, first.shape[0], step):
        yield tuple(t if t is None else t[row : row + step] for t in matrices)


def _dense(base: Sequence[Tensor]) -> Tensor | None:
    return base[0] if len(base) == 1 else None


def _supports_norm(c: DoRANorm) -> str | None:
    op = "lora_linear_fwd" if len(c.base) == 1 else "nf4_linear_fwd"
    dtypes = (c.weight_norm_sq, _dense(c.base), c.a, c.b)
    reason = refuse_device(op, c.a.device) or refuse_dtypes(*dtypes)
    return EMPTY if reason is None and 0 in (*c.meta[:2], c.a.shape[0]) else reason


def _supports_fwd(c: DoRALinearForward) -> str | None:
    reason = refuse_linear("lora_linear_fwd", [c.x], _dense(c.base), c.a, c.b, c.bias)
    return reason or refuse_dtypes(c.magnitude, c.norm)


def _supports_bwd(c: DoRALinearBackward) -> str | None:
    reason = refuse_linear("lora_linear_bwd", [c.dy, c.x, c.s], _dense(c.base), c.a, c.b)
    return reason or refuse_dtypes(c.magnitude, c.norm)


register("dora_norm", Implementation("native", dora_norm, _supports_norm))
register("dora_linear_fwd", Implementation("native", dora_linear_fwd, _supports_fwd))
register("dora_linear_bwd", Implementation("native", dora_linear_bwd, _supports_bwd))
