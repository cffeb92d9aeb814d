"""s = keep(x)·Aᵀ and ds = dy·B: a product with a rank-wide result, one pass over x or dy."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import ThinConfig, span_of
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.splitk_reduce import sums
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    keep_operand,
    rank_value,
    rest_of,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, precision, run, stride


@triton.jit
def _shrink_kernel(
    p_x,
    p_q,
    p_out,
    p_rest,
    p_rank,
    p_row,
    p_seed,
    M,
    K,
    R,
    factor,
    threshold,
    stream,
    span,
    stride_xm,
    stride_xk,
    stride_qk,
    stride_qr,
    stride_os,
    stride_om,
    stride_rank,
    stride_row,
    DROPOUT: tl.constexpr,
    FINAL: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """out[m, r] = factor · rank[r] · Σ_k keep(x)[m, k] · (row[k] · q[k, r]) over a span of k.

    Forward: s, with q = Aᵀ and factor = the kept elements' scale. Backward: ds, with x = dy, q = B,
    row = out_diag, factor = scale.

    Shapes: x[M, K] q[K, R] rank[R] row[K]; out[M, R] where FINAL, rounded to what x's type keeps of
        s but if WHOLE, and rest[M, R] what rounding took from it; else fp32 partial sums
        [spans, M, R] before the factors.
    Grid: [cdiv(M, BM), cdiv(R, BR), spans]. Sums in fp32.
    """
    dtype = p_x.dtype.element_ty
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    first = tl.program_id(2) * span
    last = min(first + span, K)
    m_m = o_m < M
    m_r = o_r < R
    o_k = first + tl.arange(0, BK)
    p_x_tile = p_x + (o_m % M)[:, None] * stride_xm + o_k[None, :].to(tl.int64) * stride_xk
    p_q_tile = p_q + o_k[:, None].to(tl.int64) * stride_qk + (o_r % R)[None, :] * stride_qr
    b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    for k0 in range(first, last, BK):
        if EVEN_K:
            b_x = tl.load(p_x_tile)  # [BM, BK]
            b_q = tl.load(p_q_tile)  # [BK, BR]
        else:
            m_k = k0 + tl.arange(0, BK) < last
            b_x = tl.load(p_x_tile, mask=m_k[None, :], other=0.0)
            b_q = tl.load(p_q_tile, mask=m_k[:, None], other=0.0)
        p_x_tile += BK * stride_xk
        p_q_tile += BK * stride_qk
        if p_row is not None:
            o_row = k0 + tl.arange(0, BK)
            b_row = tl.load(p_row + o_row * stride_row, mask=o_row < last, other=0.0)  # [BK]
            b_q = b_q.to(tl.float32) * b_row[:, None].to(tl.float32)
        fence_copies()
        if DROPOUT:
            m_keep = keep_operand(p_seed, o_m, k0, stream, threshold, BM, BK)
            b_x = tl.where(m_keep, b_x, 0.0)
        b_s = dot(b_x, cast(b_q, dtype), b_s, PRECISION)
        if DROPOUT:
            b_s = waited(b_s)
    if FINAL:
        b_s *= factor
        if p_rank is not None:
            b_rank = tl.load(p_rank + o_r * stride_rank, mask=m_r, other=0.0)  # [BR]
            b_s *= b_rank[None, :].to(tl.float32)
    o_out = tl.program_id(2).to(tl.int64) * stride_os + o_m[:, None] * stride_om + o_r[None, :]
    b_kept = b_s
    if FINAL and not WHOLE:
        b_kept = rank_value(b_s, dtype)
    tl.store(p_out + o_out, b_kept, mask=m_m[:, None] & m_r[None, :])
    if p_rest is not None:
        tl.store(p_rest + o_out, rest_of(b_s, dtype), mask=m_m[:, None] & m_r[None, :])


def shrink(
    config: ThinConfig,
    x: Tensor,
    q: Tensor,
    out: Tensor,
    *,
    factor: float,
    dropout: Dropout,
    rank: Tensor | None = None,
    row: Tensor | None = None,
    rest: Tensor | None = None,
    whole: bool = False,
) -> None:
    """out [M, R] = factor · rank ∘ keep(x)·(row ∘ q), as x's type keeps s or `whole` in fp32; with
    several spans two launches. rest, of out's strides, takes what rounding takes from it."""
    m, k = x.shape
    r = q.shape[1]
    br = block_rank(r)
    span = span_of(k, config.spans, config.step)
    spans = max(1, ceil(k / span)) if k else 1
    final = spans == 1
    target = out if final else x.new_empty((spans, m, r), dtype=torch.float32)
    run(
        _shrink_kernel,
        (ceil(m / config.block), ceil(r / br), spans),
        config.warps,
        config.stages,
        p_x=x,
        p_q=q,
        p_out=target,
        p_rest=rest if final else None,
        p_rank=rank,
        p_row=row,
        p_seed=dropout.seed,
        M=m,
        K=k,
        R=r,
        factor=float(factor),
        threshold=dropout.threshold,
        stream=dropout.stream,
        span=span,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_qk=q.stride(0),
        stride_qr=q.stride(1),
        stride_os=m * r,
        stride_om=target.stride(-2),
        stride_rank=stride(rank),
        stride_row=stride(row),
        DROPOUT=dropout.on,
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
        sums([(target, plain, factor, rank)], rest, half=x.dtype == torch.float16 and not whole)
        if plain is not out:
            out.copy_(plain)
