"""out[t] += Σ_e weight[e]·scale·s[e]·B[slot]ᵀ: token by token, or a chunk of one slot at a time."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import matrix
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot_rank,
    fence_copies,
    first_of,
    keep_tile,
    rank_value,
    waited,
)
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, rank_pages, shrunk, slot_mask
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.plan import Plan
from lora_kernels.ops.gather.triton.tiles import (
    PAGE,
    kept_scale,
    page_tile,
    rank_of,
    slot_of,
    sums_tile,
)


@triton.jit
def _gather_expand_kernel(
    s,
    pages,
    out,
    keep,
    p_slots,
    p_weights,
    p_order,
    p_edges,
    mask,
    N,
    OVERWRITE: tl.constexpr,
    MASK_S: tl.constexpr,
    MASK_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BN: tl.constexpr,
):
    """out[t] (+)= Σ_e f[e] · drop(s[e]·b), f = weight · scale, over the entries e of token t in
    their order, rounded once. A token without an adapter is not written, or is 0 where OVERWRITE.

    Shapes: s[E, ..] in PARTS parts, b[P, 16, N] out[T, N] keep[E, ..]. Entries
        of token t: order[edges[t] : edges[t + 1]], or t itself. MASK_S: the parts still lack the
        factor of x's mask; MASK_OUT: what an entry adds is masked itself. keep takes s, rounded.
    Grid: [T, cdiv(N, BN)]. Shrunk in fp32, page by page.
    """
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    o_n = n0 + tl.arange(0, BN)
    o_row = tl.arange(0, PAGE)
    b_out = tl.full([BN], 0.0, tl.float32)  # [BN]
    found = 0
    first = t
    last = t + 1
    if p_edges is not None:
        first = tl.load(p_edges + t)
        last = tl.load(p_edges + t + 1)
    for i in range(first, last):
        e = i
        if p_edges is not None:
            e = tl.load(p_order + i)
        slot = slot_of(p_slots, None, e, pages.S, 0)
        rank = rank_of(pages.ranks, slot, pages.C)
        if rank > 0:
            found = 1
            factor = tl.load(pages.scales + slot)
            if p_weights is not None:
                factor *= tl.load(p_weights + e)
            b_z = tl.full([PAGE, BN], 0.0, tl.float32)  # [16, BN], the first row counts
            for c in range(0, tl.cdiv(rank, PAGE)):
                rows = rank - c * PAGE
                page = tl.load(pages.table + slot * pages.C + c)
                b_b = page_tile(pages.p, page, rows, o_n, N, DTYPE)  # [16, BN]
                b_s = sums_tile(s, o_row + e, o_row == 0, c * PAGE, PARTS, PAGE)  # [16, 16]
                if MASK_S:
                    b_s *= kept_scale(mask.thresholds, slot)
                b_s = rank_value(b_s, DTYPE)
                if keep.p is not None:
                    if n0 == 0:
                        o_j = tl.arange(0, PAGE) + c * PAGE
                        o_keep = (o_row + e).to(tl.int64)[:, None] * keep.row + o_j[None, :]
                        m_keep = (o_row == 0)[:, None] & (o_j < rank)[None, :]
                        tl.store(keep.p + o_keep, b_s, mask=m_keep)
                b_z = dot_rank(b_s, b_b, b_z, DTYPE, PRECISION)
            b_row = first_of(b_z, 0)  # [BN]
            if MASK_OUT:
                threshold = tl.load(mask.thresholds + slot)
                o_m = tl.load(mask.rows + e) + tl.arange(0, 1)
                m_drop = keep_tile(mask.seeds + slot, o_m, n0, mask.stream, threshold, 1, BN)
                b_row = tl.where(
                    tl.reshape(m_drop, [BN]), b_row * kept_scale(mask.thresholds, slot), 0.0
                )
            b_out = tl.fma(b_row, tl.full([BN], 1.0, tl.float32) * factor, b_out)
    if OVERWRITE or found > 0:
        p_row = out.p + t.to(tl.int64) * out.row
        if not OVERWRITE:
            b_out += tl.load(p_row + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        tl.store(p_row + o_n, cast(b_out, out.p.dtype.element_ty), mask=o_n < N)


@triton.jit
def _gather_expand_grouped_kernel(
    s,
    pages,
    out,
    p_order,
    p_work,
    mask,
    N,
    chunks,
    OVERWRITE: tl.constexpr,
    MASK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The same for a chunk of BM tokens of one slot, each with this entry alone.

    Shapes: s[E, ..] b[P, 16, N] out[T, N]; work holds (slot, first, count) of each chunk, whose
        tokens are order[first : first + count]; a slot from S on has no adapter.
    ONE_PAGE: C is 1.
    Grid: [programs that walk the chunks, cdiv(N, BLOCKS · BN)]. Shrunk in fp32, page by page.
    """
    o_m = tl.arange(0, BM)
    for at in range(tl.program_id(0), chunks, tl.num_programs(0)):
        p_chunk = p_work + at * 3
        slot = tl.load(p_chunk)
        count = tl.load(p_chunk + 2)
        slot = tl.where(slot < pages.S, slot, -1)
        rank = rank_of(pages.ranks, slot, pages.C)
        if count > 0 and (OVERWRITE or rank > 0):
            m_m = o_m < count
            o_e = tl.load(p_order + tl.load(p_chunk + 1) + o_m, mask=m_m, other=0)
            scale = 0.0
            own_pages = tl.cdiv(rank, PAGE)
            if rank > 0:
                scale = tl.load(pages.scales + slot)
            if ONE_PAGE:
                page = 0
                if rank > 0:
                    page = tl.load(pages.table + slot)
                m_one = m_m & (o_m * 0 + rank > 0)
                b_one = rank_value(sums_tile(s, o_e, m_one, 0, 1, BM), DTYPE)
            if MASK_OUT:
                o_rows = tl.load(mask.rows + o_e, mask=m_m, other=0)
            first = tl.program_id(1) * BLOCKS * BN
            for n0 in range(first, tl.minimum(first + BLOCKS * BN, N), BN):
                o_n = n0 + tl.arange(0, BN)
                b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
                if ONE_PAGE:
                    b_b = page_tile(pages.p, page, rank, o_n, N, DTYPE)  # [16, BN]
                    fence_copies()
                    b_z = dot_rank(b_one, b_b, b_z, DTYPE, PRECISION)
                else:
                    for c in range(0, own_pages):
                        column = c * PAGE
                        own = tl.load(pages.table + slot * pages.C + c)
                        b_b = page_tile(pages.p, own, rank - column, o_n, N, DTYPE)  # [16, BN]
                        b_s = sums_tile(s, o_e, m_m, column, 1, BM)  # [BM, 16]
                        fence_copies()
                        b_s = rank_value(b_s, DTYPE)
                        b_z = waited(dot_rank(b_s, b_b, b_z, DTYPE, PRECISION))
                if MASK_OUT:
                    if rank > 0:
                        threshold = tl.load(mask.thresholds + slot)
                        m_drop = keep_tile(
                            mask.seeds + slot, o_rows, n0, mask.stream, threshold, BM, BN
                        )
                        b_z = tl.where(m_drop, b_z * kept_scale(mask.thresholds, slot), 0.0)
                # As a chain that begins with 0, which an entry's own program has.
                b_scale = tl.full([BM, BN], 1.0, tl.float32) * scale
                b_z = tl.fma(b_z, b_scale, tl.full([BM, BN], 0.0, tl.float32))
                o_out = o_e.to(tl.int64)[:, None] * out.row + o_n[None, :]
                m_out = m_m[:, None] & (o_n < N)[None, :]
                if not OVERWRITE:
                    b_z += tl.load(out.p + o_out, mask=m_out, other=0.0).to(tl.float32)
                tl.store(out.p + o_out, cast(b_z, out.p.dtype.element_ty), mask=m_out)


def expand(
    s: Tensor,
    b: Tensor,
    out: Tensor,
    p: RankPages,
    entries: Entries,
    plan: Plan,
    *,
    dtype: torch.dtype,
    keep: Tensor | None = None,
    late: Mask | None = None,
    mask: Mask | None = None,
    overwrite: bool,
) -> None:
    """out [T, N] += what each entry adds, or = it.

    Args:
        s: [E, ..], or fp32 parts [split_k, E, ..].
        dtype: of the products.
        keep: takes the sums of the parts, [E, ..].
        late: the mask of x, whose factor the parts still lack.
        mask: of what is added.
    """
    n = b.shape[2]
    shared = {
        "s": shrunk(s),
        "pages": rank_pages(p, b),
        "out": matrix(out),
        "mask": slot_mask(mask or late),
        "N": n,
        "OVERWRITE": overwrite,
        "MASK_OUT": mask is not None,
        "PRECISION": precision(dtype),
        "DTYPE": _triton_type(dtype),
    }
    if plan.grouped and entries.tokens is None:
        chunks = entries.chunks(plan.block_m)
        across = ceil(n / (plan.chunk_n * plan.blocks))
        run(
            _gather_expand_grouped_kernel,
            (entries.programs(plan.block_m, across), across),
            plan.chunk_warps,
            plan.stages,
            p_order=chunks.order,
            p_work=chunks.work,
            chunks=chunks.work.shape[0],
            ONE_PAGE=p.table.shape[1] == 1,
            BLOCKS=plan.blocks,
            BM=plan.block_m,
            BN=plan.chunk_n,
            **shared,
        )
        return
    mixed = entries.tokens is not None
    run(
        _gather_expand_kernel,
        (entries.tokens_count, ceil(n / plan.block_n)),
        plan.expand_warps,
        plan.stages,
        keep=matrix(keep),
        p_slots=entries.slots,
        p_weights=entries.weights,
        p_order=entries.by_token[0] if mixed else None,
        p_edges=entries.by_token[1] if mixed else None,
        MASK_S=late is not None,
        PARTS=s.shape[0] if s.dim() == 3 else 1,
        BN=plan.block_n,
        **shared,
    )


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
