"""Gradients of the pages and the scales: sums over the entries of a slot, in their order."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import matrix
from lora_kernels.ops.common.triton.tiles import cast, dot_rank, keep_operand
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, rank_pages, slot_mask
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.tiles import PAGE, kept_scale, rank_of

# Entries of a slot that a program looks at together, where only their order counts.
_GROUP = 64
_SUM_BLOCK = 256


@triton.jit
def _gather_grad_kernel(
    t,
    x,
    pages,
    p_tokens,
    p_weights,
    p_order,
    p_edges,
    mask,
    K,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out[page, j, k] = scale · Σ_e weight[e] · t[e, 16 c + j] · drop(x)[t, k] over the entries e
    of the slot whose page c it is; zeros past the rank.

    Shapes: t[E, ..] x[T, K] out[P, 16, K] in pages; entries of slot i are
        order[edges[i] : edges[i + 1]].
    Grid: [S, C, cdiv(K, BK)]. Shrunk in fp32.
    """
    DTYPE: tl.constexpr = x.p.dtype.element_ty
    slot = tl.program_id(0)
    rank = rank_of(pages.ranks, slot, pages.C)
    column = tl.program_id(1) * PAGE
    if rank > column:
        k0 = tl.program_id(2) * BK
        o_k = k0 + tl.arange(0, BK)
        o_j = tl.arange(0, PAGE)
        m_k = o_k < K
        m_j = o_j < rank - column
        first = tl.load(p_edges + slot)
        last = tl.load(p_edges + slot + 1)
        p_columns = x.p + o_k[None, :].to(tl.int64) * x.col
        b_sum = tl.full([PAGE, BK], 0.0, tl.float32)  # [16, BK]
        for i0 in range(first, last, BM):
            o_i = i0 + tl.arange(0, BM)
            m_i = o_i < last
            o_e = tl.load(p_order + o_i, mask=m_i, other=0)  # [BM]
            o_t = o_e
            if p_tokens is not None:
                o_t = tl.load(p_tokens + o_e, mask=m_i, other=0)
            o_s = o_e.to(tl.int64)[None, :] * t.row + (o_j + column)[:, None]
            b_t = tl.load(t.p + o_s, mask=m_j[:, None] & m_i[None, :], other=0.0)  # [16, BM]
            if p_weights is not None:
                b_weight = tl.load(p_weights + o_e, mask=m_i, other=0.0)
                b_t = b_t.to(tl.float32) * b_weight[None, :]
            o_x = o_t.to(tl.int64)[:, None] * x.row
            b_x = tl.load(p_columns + o_x, mask=m_i[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
            if mask.seeds is not None:
                o_rows = tl.load(mask.rows + o_e, mask=m_i, other=0)
                threshold = tl.load(mask.thresholds + slot)
                m_keep = keep_operand(mask.seeds + slot, o_rows, k0, mask.stream, threshold, BM, BK)
                b_x = tl.where(m_keep, b_x, 0.0)
            b_sum = dot_rank(b_t, b_x, b_sum, DTYPE, PRECISION)
        factor = tl.load(pages.scales + slot)
        if mask.seeds is not None:
            factor *= kept_scale(mask.thresholds, slot)
        b_sum = tl.where(m_j[:, None], b_sum * factor, 0.0)
        page = tl.load(pages.table + slot * pages.C + tl.program_id(1))
        p_page = pages.p + page.to(tl.int64) * PAGE * K
        tl.store(
            p_page + o_j[:, None] * K + o_k[None, :],
            cast(b_sum, pages.p.dtype.element_ty),
            mask=m_k[None, :],
        )


def grad(
    t: Tensor, x: Tensor, out: Tensor, p: RankPages, entries: Entries, mask: Mask | None
) -> None:
    """The gradient of a or b: out [P, 16, K] from t [E, ranks] and x [T, K]."""
    k, wide = x.shape[1], x.dtype == torch.float32
    step, block = (32, 64) if wide else (64, 128)
    by_slot = entries.chunks(_GROUP)
    run(
        _gather_grad_kernel,
        (p.slots, p.table.shape[1], ceil(k / block)),
        4,
        2,
        t=matrix(t),
        x=matrix(x),
        pages=rank_pages(p, out),
        p_tokens=entries.tokens,
        p_weights=entries.weights,
        p_order=by_slot.order,
        p_edges=by_slot.edges,
        mask=slot_mask(mask),
        K=k,
        PRECISION=precision(x.dtype),
        BM=step,
        BK=block,
    )


@triton.jit
def _gather_scale_grad_kernel(
    p_product,
    p_weights,
    p_out,
    p_order,
    p_edges,
    BLOCK: tl.constexpr,
):
    """out[i] = Σ_e weight[e] · product[e] over the entries e of slot i.

    Shapes: product[E] weights[E] out[S]. Grid: [S]. Shrunk in fp32.
    """
    slot = tl.program_id(0)
    first = tl.load(p_edges + slot)
    last = tl.load(p_edges + slot + 1)
    b_sum = tl.full([BLOCK], 0.0, tl.float32)  # [BLOCK]
    for i0 in range(first, last, BLOCK):
        o_i = i0 + tl.arange(0, BLOCK)
        m_i = o_i < last
        o_e = tl.load(p_order + o_i, mask=m_i, other=0)
        b_product = tl.load(p_product + o_e, mask=m_i, other=0.0)
        if p_weights is not None:
            b_product *= tl.load(p_weights + o_e, mask=m_i, other=0.0)
        b_sum += b_product
    tl.store(p_out + slot, tl.sum(b_sum, axis=0))


def scale_sums(product: Tensor, out: Tensor, entries: Entries) -> None:
    by_slot = entries.chunks(_GROUP)
    run(
        _gather_scale_grad_kernel,
        (entries.slots_count,),
        4,
        1,
        p_product=product,
        p_weights=entries.weights,
        p_out=out,
        p_order=by_slot.order,
        p_edges=by_slot.edges,
        BLOCK=_SUM_BLOCK,
    )
