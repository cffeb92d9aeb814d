"""s[e] = drop(x[t])·A[slot]ᵀ: a pass over x and the pages of each entry's slot."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import matrix
from lora_kernels.ops.common.triton.tiles import cast, dot, keep_operand, rank_value
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, rank_pages, shrunk, slot_mask
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.plan import Plan
from lora_kernels.ops.gather.triton.tiles import PAGE, kept_scale, page_tile, rank_of, slot_of


@triton.jit
def _gather_shrink_kernel(
    x,
    s,
    pages,
    p_slots,
    p_tokens,
    p_order,
    p_work,
    mask,
    T,
    K,
    per_split,
    count_all,
    SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ONE_STEP: tl.constexpr,
):
    """s[e, j] = Σ_k drop(x)[t, k] · a[page, j, k] over the pages of e's slot.

    Shapes: x[T, K] a[P, 16, K] table[S, C]; s[E, ..] in its own type, or where SPLIT fp32 parts
        [split_k, E, ..], one for each part of K, without the mask's factor. HALF:
        s is rounded as `rank.py` says.
    count_all: entries, or chunks of BM entries of one slot where `work` holds (slot, first, count).
    Grid: [programs that walk these, split_k where SPLIT, programs that share the pages]. Shrunk in
        fp32, part by part.
    """
    DTYPE: tl.constexpr = x.p.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    for at in range(tl.program_id(0), count_all, tl.num_programs(0)):
        if p_work is None:
            slot = slot_of(p_slots, p_tokens, at, pages.S, T)
            m_m = o_m == 0
            o_e = o_m + at
        else:
            p_chunk = p_work + at * 3
            slot = tl.load(p_chunk)
            count = tl.load(p_chunk + 2)
            slot = tl.where((slot < pages.S) & (count > 0), slot, -1)
            m_m = o_m < count
            o_e = tl.load(p_order + tl.load(p_chunk + 1) + o_m, mask=m_m, other=0)
        rank = rank_of(pages.ranks, slot, pages.C)
        if rank > 0:
            o_t = o_e
            if p_tokens is not None:
                o_t = tl.load(p_tokens + o_e, mask=m_m, other=0)
            p_tile = x.p + o_t.to(tl.int64)[:, None] * x.row
            first = 0
            last = K
            p_sums = s.p
            if SPLIT:
                first = tl.program_id(1) * per_split
                last = tl.minimum(first + per_split, K)
                p_sums += tl.program_id(1).to(tl.int64) * s.part
            if mask.seeds is not None:
                threshold = tl.load(mask.thresholds + slot)
                o_rows = tl.load(mask.rows + o_e, mask=m_m, other=0)
            if ONE_STEP:
                o_i = first + o_k
                m_x = m_m[:, None] & (o_i < last)[None, :]
                b_x = tl.load(p_tile + o_i[None, :].to(tl.int64) * x.col, mask=m_x, other=0.0)
                if mask.seeds is not None:
                    m_keep = keep_operand(
                        mask.seeds + slot, o_rows, first, mask.stream, threshold, BM, BK
                    )
                    b_x = tl.where(m_keep, b_x, 0.0)
            for c in range(tl.program_id(2), tl.cdiv(rank, PAGE), tl.num_programs(2)):
                page = tl.load(pages.table + slot * pages.C + c)
                b_s = tl.full([PAGE, BM], 0.0, tl.float32)  # [16, BM]
                if ONE_STEP:
                    b_a = page_tile(
                        pages.p, page, rank - c * PAGE, first + o_k, K, DTYPE
                    )  # [16, BK]
                    b_s = dot(b_a, b_x.T, b_s, PRECISION)
                else:
                    for start in range(first, last, per_split):
                        b_part = tl.full([PAGE, BM], 0.0, tl.float32)  # [16, BM]
                        end = tl.minimum(start + per_split, last)
                        for k0 in range(start, end, BK):
                            o_i = k0 + o_k
                            m_x = m_m[:, None] & (o_i < end)[None, :]
                            o_x = o_i[None, :].to(tl.int64) * x.col
                            b_x = tl.load(p_tile + o_x, mask=m_x, other=0.0)  # [BM, BK]
                            if mask.seeds is not None:
                                m_keep = keep_operand(
                                    mask.seeds + slot, o_rows, k0, mask.stream, threshold, BM, BK
                                )
                                b_x = tl.where(m_keep, b_x, 0.0)
                            b_a = page_tile(
                                pages.p, page, rank - c * PAGE, o_i, K, DTYPE
                            )  # [16, BK]
                            b_part = dot(b_a, b_x.T, b_part, PRECISION)
                        b_s += b_part
                if not SPLIT:
                    if mask.seeds is not None:
                        b_s *= kept_scale(mask.thresholds, slot)
                if HALF:
                    b_s = rank_value(b_s, DTYPE)
                o_j = tl.arange(0, PAGE) + c * PAGE
                o_s = o_e.to(tl.int64)[None, :] * s.row + o_j[:, None]
                tl.store(p_sums + o_s, cast(b_s, s.p.dtype.element_ty), mask=m_m[None, :])


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
    """s [E, ..] in its type, or fp32 parts [split_k, E, ..] where the plan splits K; with `half` s
    keeps what fp16 activations do."""
    k = x.shape[1]
    chunks = entries.chunks(plan.block_m) if plan.grouped else None
    shares = min(plan.page_programs, p.table.shape[1])
    programs = entries.count if chunks is None else entries.programs(plan.block_m, shares)
    run(
        _gather_shrink_kernel,
        (programs, plan.split_k if plan.split else 1, shares),
        plan.shrink_warps,
        plan.stages,
        whole_registers=True,
        x=matrix(x),
        s=shrunk(s),
        pages=rank_pages(p, a),
        p_slots=entries.slots,
        p_tokens=entries.tokens,
        p_order=None if chunks is None else chunks.order,
        p_work=None if chunks is None else chunks.work,
        mask=slot_mask(mask),
        T=entries.tokens_count,
        K=k,
        per_split=plan.per_split,
        count_all=programs if chunks is None else chunks.work.shape[0],
        SPLIT=plan.split,
        HALF=half,
        PRECISION=precision(x.dtype),
        BM=16 if chunks is None else plan.block_m,
        BK=plan.block_k,
        ONE_STEP=plan.split and plan.per_split == plan.block_k,
    )
