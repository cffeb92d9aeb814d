"""s[e] = drop(x[t])·A[slot]ᵀ: a pass over x and the pages of each entry's slot."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.tiles import cast, dot, keep_operand, rank_value
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, layout, mask_args
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.plan import Plan
from lora_kernels.ops.gather.triton.tiles import PAGE, kept_scale, page_tile, rank_of, slot_of


@triton.jit
def _gather_shrink_kernel(
    p_x,
    p_a,
    p_s,
    p_slots,
    p_tokens,
    p_table,
    p_ranks,
    p_order,
    p_work,
    p_seeds,
    p_thresholds,
    p_rows,
    T,
    K,
    S,
    C,
    span,
    size,
    stream,
    count_all,
    stride_xm,
    stride_xk,
    stride_s,
    SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """s[e, j] = Σ_k drop(x)[t, k] · a[page, j, k] over the pages of e's slot.

    Shapes: x[T, K] a[P, 16, K] table[S, C]; s[E, ..] in its own type, or where SPLIT fp32 parts
        [spans, E, ..] of `size` elements, one for each span of K, without the mask's factor. HALF:
        s is rounded as `rank.py` says.
    count_all: entries, or chunks of BM entries of one slot where `work` holds (slot, first, count).
    Grid: [programs that walk these, spans where SPLIT, programs that share the pages]. Sums in
        fp32, span by span.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    for at in range(tl.program_id(0), count_all, tl.num_programs(0)):
        if p_work is None:
            slot = slot_of(p_slots, p_tokens, at, S, T)
            m_m = o_m == 0
            o_e = o_m + at
        else:
            p_chunk = p_work + at * 3
            slot = tl.load(p_chunk)
            count = tl.load(p_chunk + 2)
            slot = tl.where((slot < S) & (count > 0), slot, -1)
            m_m = o_m < count
            o_e = tl.load(p_order + tl.load(p_chunk + 1) + o_m, mask=m_m, other=0)
        rank = rank_of(p_ranks, slot, C)
        if rank > 0:
            o_t = o_e
            if p_tokens is not None:
                o_t = tl.load(p_tokens + o_e, mask=m_m, other=0)
            p_tile = p_x + o_t.to(tl.int64)[:, None] * stride_xm
            first = 0
            last = K
            p_sums = p_s
            if SPLIT:
                first = tl.program_id(1) * span
                last = tl.minimum(first + span, K)
                p_sums += tl.program_id(1).to(tl.int64) * size
            if p_seeds is not None:
                threshold = tl.load(p_thresholds + slot)
                o_rows = tl.load(p_rows + o_e, mask=m_m, other=0)
            if ONE_STEP:
                o_i = first + o_k
                m_x = m_m[:, None] & (o_i < last)[None, :]
                b_x = tl.load(p_tile + o_i[None, :].to(tl.int64) * stride_xk, mask=m_x, other=0.0)
                if p_seeds is not None:
                    m_keep = keep_operand(p_seeds + slot, o_rows, first, stream, threshold, BM, BK)
                    b_x = tl.where(m_keep, b_x, 0.0)
            for c in range(tl.program_id(2), tl.cdiv(rank, PAGE), tl.num_programs(2)):
                page = tl.load(p_table + slot * C + c)
                b_s = tl.full([PAGE, BM], 0.0, tl.float32)  # [16, BM]
                if ONE_STEP:
                    b_a = page_tile(p_a, page, rank - c * PAGE, first + o_k, K, DTYPE)  # [16, BK]
                    b_s = dot(b_a, b_x.T, b_s, PRECISION)
                else:
                    for start in range(first, last, span):
                        b_part = tl.full([PAGE, BM], 0.0, tl.float32)  # [16, BM]
                        end = tl.minimum(start + span, last)
                        for k0 in range(start, end, BK):
                            o_i = k0 + o_k
                            m_x = m_m[:, None] & (o_i < end)[None, :]
                            o_x = o_i[None, :].to(tl.int64) * stride_xk
                            b_x = tl.load(p_tile + o_x, mask=m_x, other=0.0)  # [BM, BK]
                            if p_seeds is not None:
                                m_keep = keep_operand(
                                    p_seeds + slot, o_rows, k0, stream, threshold, BM, BK
                                )
                                b_x = tl.where(m_keep, b_x, 0.0)
                            b_a = page_tile(p_a, page, rank - c * PAGE, o_i, K, DTYPE)  # [16, BK]
                            b_part = dot(b_a, b_x.T, b_part, PRECISION)
                        b_s += b_part
                if not SPLIT:
                    if p_seeds is not None:
                        b_s *= kept_scale(p_thresholds, slot)
                if HALF:
                    b_s = rank_value(b_s, DTYPE)
                o_j = tl.arange(0, PAGE) + c * PAGE
                o_s = o_e.to(tl.int64)[None, :] * stride_s + o_j[:, None]
                tl.store(p_sums + o_s, cast(b_s, p_s.dtype.element_ty), mask=m_m[None, :])


def shrink(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    p: RankPages,
    entries: Entries,
    mask: Mask | None,
    plan: Plan,
    half: bool = False,
) -> None:
    """s [E, ..] in its type, or fp32 parts [spans, E, ..] where the plan splits K; with `half` s
    keeps what fp16 activations do."""
    k = x.shape[1]
    chunks = entries.chunks(plan.block_m) if plan.chunked else None
    shares = min(plan.page_programs, p.table.shape[1])
    programs = entries.count if chunks is None else entries.programs(plan.block_m, shares)
    run(
        _gather_shrink_kernel,
        (programs, plan.spans if plan.split else 1, shares),
        plan.shrink_warps,
        plan.stages,
        whole_registers=True,
        p_x=x,
        p_a=a,
        p_s=s,
        p_slots=entries.slots,
        p_tokens=entries.tokens,
        p_table=p.table,
        p_ranks=p.ranks,
        p_order=None if chunks is None else chunks.order,
        p_work=None if chunks is None else chunks.work,
        T=entries.tokens_count,
        K=k,
        S=entries.slots_count,
        C=p.table.shape[1],
        count_all=programs if chunks is None else chunks.work.shape[0],
        span=plan.span,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        SPLIT=plan.split,
        HALF=half,
        PRECISION=precision(x.dtype),
        BM=16 if chunks is None else plan.block_m,
        BK=plan.block_k,
        ONE_STEP=plan.split and plan.span == plan.block_k,
        **layout(s),
        **mask_args(mask),
    )
