"""s = keep(x)·Aᵀ and ds = dy·B: products with rank-wide results, one pass over x or dy."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.rank_wide import shrink_config, split_size
from lora_kernels.ops.common.triton.arguments import mask, matrix, vector
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    keep_operand,
    load_step,
    rank_value,
    rounding_residual,
    waited,
)
from lora_kernels.ops.common.triton_host import NO_DROPOUT, Dropout, precision, run


class Projection(NamedTuple):
    """out [M, R] = factor · rank ∘ x·q, its rows contiguous; residual, of the same strides, takes
    what rounding takes from it."""

    q: Tensor
    out: Tensor
    factor: float
    rank: Tensor | None = None
    residual: Tensor | None = None


class _Projection(NamedTuple):
    """The same as the kernel takes it; `split`: from one part of K to the next."""

    q: Any
    q_row: Any
    q_col: Any
    out: Any
    out_row: Any
    split: Any
    R: Any
    factor: Any
    rank: Any
    rank_step: Any
    residual: Any


@triton.jit
def _shrink_step(
    b_s,
    b_x,
    c,
    row,
    mask,
    stream,
    o_m,
    k0,
    last,
    EVEN_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """b_s + keep(b_x)·(row ∘ q) of one step of K."""
    dtype = b_x.dtype
    o_k = k0 + tl.arange(0, BK)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    p_q = c.q + o_k[:, None].to(tl.int64) * c.q_row
    if EVEN_R:
        b_q = load_step(p_q + (o_r % c.R)[None, :] * c.q_col, (o_k < last)[:, None], EVEN_K)
    else:
        m_q = (o_k < last)[:, None] & (o_r < c.R)[None, :]
        b_q = tl.load(p_q + o_r[None, :] * c.q_col, mask=m_q, other=0.0)  # [BK, BR]
    if row.p is not None:
        b_row = tl.load(row.p + o_k * row.step, mask=o_k < last, other=0.0)  # [BK]
        b_q = b_q.to(tl.float32) * b_row[:, None].to(tl.float32)
    fence_copies()
    if mask.DROPOUT:
        m_keep = keep_operand(mask.seed, o_m, k0, stream, mask.threshold, BM, BK)
        b_x = tl.where(m_keep, b_x, 0.0)
    b_s = dot(b_x, cast(b_q, dtype), b_s, PRECISION)
    if mask.DROPOUT:
        b_s = waited(b_s)
    return b_s


@triton.jit
def _store(
    b_s,
    c,
    o_m,
    M,
    DTYPE: tl.constexpr,
    FINAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BR: tl.constexpr,
):
    """One projection's sums with their factors, or where not FINAL as they are."""
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_r = o_r < c.R
    m_out = (o_m < M)[:, None] & m_r[None, :]
    if FINAL:
        b_s *= c.factor
        if c.rank is not None:
            b_rank = tl.load(c.rank + o_r * c.rank_step, mask=m_r, other=0.0)  # [BR]
            b_s *= b_rank[None, :].to(tl.float32)
    o_out = (
        tl.program_id(2).to(tl.int64) * c.split
        + o_m[:, None].to(tl.int64) * c.out_row
        + o_r[None, :]
    )
    b_kept = b_s
    if FINAL and not WHOLE:
        b_kept = rank_value(b_s, DTYPE)
    tl.store(c.out + o_out, b_kept, mask=m_out)
    if c.residual is not None:
        tl.store(c.residual + o_out, rounding_residual(b_s, DTYPE), mask=m_out)


@triton.jit
def _shrink_kernel(
    x,
    projections,
    row,
    mask,
    M,
    K,
    per_split,
    COUNT: tl.constexpr,
    EVEN_R: tl.constexpr,
    FINAL: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """out_i[m, r] = factor_i · rank_i[r] · Σ_k keep_i(x)[m, k] · (row[k] · q_i[k, r]) over a part
    of k, for COUNT <= 3 projections.

    Forward: s_i, with q = Aᵀ and factor = the kept elements' scale. Backward: ds, with x = dy,
    q = B, row = out_diag, factor = scale.

    Shapes: x[M, K] q_i[K, R_i] rank_i[R_i] row[K]; out_i[M, R_i] where FINAL, rounded to what x's
        type keeps of s but if WHOLE, and residual_i[M, R_i] what rounding took from it; else fp32
        partial sums [split_k, M, R_i] before the factors.
    Grid: [cdiv(M, BM), cdiv(max R_i, BR), split_k]. Sums in fp32.
    """
    DTYPE: tl.constexpr = x.p.dtype.element_ty
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * per_split
    last = min(first + per_split, K)
    p_x = x.p + (o_m % M)[:, None].to(tl.int64) * x.row
    if COUNT == 1:  # of three the registers would not hold the pointers
        p_x += (first + tl.arange(0, BK))[None, :].to(tl.int64) * x.col
    b_0 = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    b_1 = tl.full([BM, BR], 0.0, tl.float32)
    b_2 = tl.full([BM, BR], 0.0, tl.float32)
    for k0 in range(first, last, BK):
        o_k = k0 + tl.arange(0, BK)
        if COUNT == 1:
            b_x = load_step(p_x, (o_k < last)[None, :], EVEN_K)  # [BM, BK]
            p_x += BK * x.col
        else:
            o_x = o_k[None, :].to(tl.int64) * x.col
            b_x = load_step(p_x + o_x, (o_k < last)[None, :], EVEN_K)
        b_0 = _shrink_step(
            b_0, b_x, projections[0], row, mask, mask.stream, o_m, k0, last, EVEN_R, EVEN_K,
            PRECISION, BM, BK, BR,
        )  # fmt: skip
        if COUNT > 1:
            b_1 = _shrink_step(
                b_1, b_x, projections[1], row, mask, mask.stream + 1, o_m, k0, last, EVEN_R,
                EVEN_K, PRECISION, BM, BK, BR,
            )  # fmt: skip
        if COUNT > 2:
            b_2 = _shrink_step(
                b_2, b_x, projections[2], row, mask, mask.stream + 2, o_m, k0, last, EVEN_R,
                EVEN_K, PRECISION, BM, BK, BR,
            )  # fmt: skip
    _store(b_0, projections[0], o_m, M, DTYPE, FINAL, WHOLE, BR)
    if COUNT > 1:
        _store(b_1, projections[1], o_m, M, DTYPE, FINAL, WHOLE, BR)
    if COUNT > 2:
        _store(b_2, projections[2], o_m, M, DTYPE, FINAL, WHOLE, BR)


def shrink(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    dropout: Dropout = NO_DROPOUT,
    row: Tensor | None = None,
    whole: bool = False,
) -> None:
    """Each out of up to three projections of keep(x), with `row` ∘ q in q's place: as x's type
    keeps s, or `whole` in fp32. With a split K two launches."""
    m, k = x.shape
    count = len(projections)
    r = max(p.q.shape[1] for p in projections)
    br = block_rank(r)
    config = shrink_config(m, k, planned_device(x.device), br, x.element_size())
    if count > 1:
        config = config.of_several(br)
    per_split = split_size(k, config.split_k, config.step)
    split_k = max(1, ceil(k / per_split)) if k else 1
    final = split_k == 1
    targets = [p.out for p in projections]
    if not final:
        targets = [x.new_empty((split_k, *t.shape), dtype=torch.float32) for t in targets]
    run(
        _shrink_kernel,
        (ceil(m / config.block), ceil(r / br), split_k),
        config.warps,
        config.stages,
        x=matrix(x),
        projections=tuple(
            _Projection(
                *matrix(p.q),
                targets[i],
                targets[i].stride(-2),
                p.out.numel(),
                p.q.shape[1],
                float(p.factor),
                *vector(p.rank),
                p.residual if final else None,
            )
            for i, p in enumerate(projections)
        ),
        row=vector(row),
        mask=mask(dropout),
        M=m,
        K=k,
        per_split=per_split,
        COUNT=count,
        # A lone layer's few ranks are loaded again, three projections' are masked.
        EVEN_R=count < 2 or all(p.q.shape[1] % br == 0 for p in projections),
        FINAL=final,
        WHOLE=whole,
        EVEN_K=k % config.step == 0,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=config.step,
        BR=br,
    )
    if final:
        return
    half = x.dtype == torch.float16 and not whole
    for p, parts in zip(projections, targets, strict=True):
        plain = p.out if p.out.is_contiguous() else torch.empty_like(p.out)
        splitk_reduce([Sum(parts, plain, p.factor, p.rank, residual=p.residual, half=half)])
        if plain is not p.out:
            p.out.copy_(plain)
