"""Triton pieces of the multi-adapter kernels: pages, an adapter's part of a slot, its mask.

A page's 16 rows are one product's depth or one product's rows, so that every way to cut a batch
makes the same sums in the same order.
"""

import triton
import triton.language as tl

from lora_kernels.ops.common.triton.tiles import cast

PAGE = tl.constexpr(16)


@triton.jit
def slot_of(p_slots, p_tokens, e, S, T):
    """The slot of entry e; -1 where it has none, or its token is not there."""
    slot = tl.load(p_slots + e)
    slot = tl.where(slot < S, slot, -1)
    if p_tokens is not None:
        token = tl.load(p_tokens + e)
        slot = tl.where((token >= 0) & (token < T), slot, -1)
    return slot


@triton.jit
def rank_of(p_ranks, slot, C):
    """The rank of a slot's adapter, 0 where there is no slot; no more than its C pages hold."""
    rank = 0
    if slot >= 0:
        rank = tl.minimum(tl.load(p_ranks + slot), C * PAGE)
    return rank


@triton.jit
def page_tile(p_pages, page, rows, o_c, WIDTH, DTYPE: tl.constexpr):
    """Rows of a page at columns o_c [16, BC]; zeros past `rows`, which may hold anything."""
    o_j = tl.arange(0, PAGE)
    p_page = p_pages + page.to(tl.int64) * PAGE * WIDTH
    m_page = (o_j < rows)[:, None] & (o_c < WIDTH)[None, :]
    b_page = tl.load(p_page + o_j[:, None] * WIDTH + o_c[None, :], mask=m_page, other=0.0)
    if b_page.dtype != DTYPE:
        b_page = cast(b_page.to(tl.float32), DTYPE)
    return b_page


@triton.jit
def kept_scale(p_thresholds, slot):
    """1 / (1 - p) of a slot."""
    threshold = tl.load(p_thresholds + slot)
    return tl.math.div_rn(65536.0, (65536 - threshold).to(tl.float32))


@triton.jit
def sums_tile(s, o_e, m_e, column, PARTS: tl.constexpr, BM: tl.constexpr):
    """s of entries o_e at 16 columns [BM, 16] in fp32: PARTS arrays added in
    their order. What is past the rank there was written as zeros."""
    o_s = o_e.to(tl.int64)[:, None] * s.row + (tl.arange(0, PAGE) + column)[None, :]
    b_s = tl.full([BM, PAGE], 0.0, tl.float32)
    p_s = s.p
    for _ in tl.static_range(PARTS):
        b_s += tl.load(p_s + o_s, mask=m_e[:, None], other=0.0).to(tl.float32)
        p_s += s.part
    return b_s
