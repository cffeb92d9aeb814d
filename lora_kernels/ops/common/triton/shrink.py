"""s = keep(x)·Aᵀ and ds = dy·B: a product with a rank-wide result, one pass over x or dy."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import RankWideConfig, split_size
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import Matrix, mask, matrix, vector
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    keep_operand,
    rank_value,
    rounding_residual,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, precision, run


@triton.jit
def _shrink_kernel(
    x,
    q,
    out,
    p_residual,
    rank,
    row,
    mask,
    M,
    K,
    R,
    factor,
    per_split,
    stride_split,
    FINAL: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, r] = factor · rank[r] · Σ_k keep(x)[m, k] · (row[k] · q[k, r]) over a part of k.

    Forward: s, with q = Aᵀ and factor = the kept elements' scale. Backward: ds, with x = dy, q = B,
    row = out_diag, factor = scale.

    Shapes: x[M, K] q[K, R] rank[R] row[K]; out[M, R] where FINAL, rounded to what x's type keeps of
        s but if WHOLE, and residual[M, R] what rounding took from it; else fp32 partial sums
        [split_k, M, R] before the factors.
    Grid: [cdiv(M, BM), cdiv(R, BR), split_k]. Sums in fp32.
    """
    dtype = x.p.dtype.element_ty
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    first = tl.program_id(2) * per_split
    last = min(first + per_split, K)
    m_m = o_m < M
    m_r = o_r < R
    o_k = first + tl.arange(0, BK)
    p_x_tile = x.p + (o_m % M)[:, None] * x.row + o_k[None, :].to(tl.int64) * x.col
    p_q_tile = q.p + o_k[:, None].to(tl.int64) * q.row + (o_r % R)[None, :] * q.col
    b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    for k0 in range(first, last, BK):
        if EVEN_K:
            b_x = tl.load(p_x_tile)  # [BM, BK]
            b_q = tl.load(p_q_tile)  # [BK, BR]
        else:
            m_k = k0 + tl.arange(0, BK) < last
            b_x = tl.load(p_x_tile, mask=m_k[None, :], other=0.0)
            b_q = tl.load(p_q_tile, mask=m_k[:, None], other=0.0)
        p_x_tile += BK * x.col
        p_q_tile += BK * q.row
        if row.p is not None:
            o_row = k0 + tl.arange(0, BK)
            b_row = tl.load(row.p + o_row * row.step, mask=o_row < last, other=0.0)  # [BK]
            b_q = b_q.to(tl.float32) * b_row[:, None].to(tl.float32)
        fence_copies()
        if mask.DROPOUT:
            m_keep = keep_operand(mask.seed, o_m, k0, mask.stream, mask.threshold, BM, BK)
            b_x = tl.where(m_keep, b_x, 0.0)
        b_s = dot(b_x, cast(b_q, dtype), b_s, PRECISION)
        if mask.DROPOUT:
            b_s = waited(b_s)
    if FINAL:
        b_s *= factor
        if rank.p is not None:
            b_rank = tl.load(rank.p + o_r * rank.step, mask=m_r, other=0.0)  # [BR]
            b_s *= b_rank[None, :].to(tl.float32)
    o_out = tl.program_id(2).to(tl.int64) * stride_split + o_m[:, None] * out.row + o_r[None, :]
    b_kept = b_s
    if FINAL and not WHOLE:
        b_kept = rank_value(b_s, dtype)
    tl.store(out.p + o_out, b_kept, mask=m_m[:, None] & m_r[None, :])
    if p_residual is not None:
        tl.store(
            p_residual + o_out, rounding_residual(b_s, dtype), mask=m_m[:, None] & m_r[None, :]
        )


def shrink(
    config: RankWideConfig,
    x: Tensor,
    q: Tensor,
    out: Tensor,
    *,
    factor: float,
    dropout: Dropout,
    rank: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    whole: bool = False,
) -> None:
    """out [M, R] = factor · rank ∘ keep(x)·(row ∘ q), as x's type keeps s or `whole` in fp32; with
    a split K two launches. residual, of out's strides, takes what rounding takes from it."""
    m, k = x.shape
    r = q.shape[1]
    br = block_rank(r)
    per_split = split_size(k, config.split_k, config.step)
    split_k = max(1, ceil(k / per_split)) if k else 1
    final = split_k == 1
    target = out if final else x.new_empty((split_k, m, r), dtype=torch.float32)
    run(
        _shrink_kernel,
        (ceil(m / config.block), ceil(r / br), split_k),
        config.warps,
        config.stages,
        x=matrix(x),
        q=matrix(q),
        out=Matrix(target, target.stride(-2), 1),
        p_residual=residual if final else None,
        rank=vector(rank),
        row=vector(row),
        mask=mask(dropout),
        M=m,
        K=k,
        R=r,
        factor=float(factor),
        per_split=per_split,
        stride_split=m * r,
        FINAL=final,
        WHOLE=whole,
        EVEN_K=k % config.step == 0,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=config.step,
        BR=br,
    )
    if not final:
        plain = out if out.is_contiguous() else torch.empty_like(out)
        half = x.dtype == torch.float16 and not whole
        splitk_reduce([Sum(target, plain, factor, rank, residual=residual, half=half)])
        if plain is not out:
            out.copy_(plain)
