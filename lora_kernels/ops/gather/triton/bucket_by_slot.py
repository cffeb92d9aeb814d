"""Entries bucketed by slot, and cut into chunks: what a call's programs take."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.gather.triton.plan import capacity

# Entries that a program of the list looks at together.
BUCKET_BLOCK = 1024


@dataclass(frozen=True)
class Chunks:
    """Entries by slot; those without an adapter are slot S.

    Attributes:
        order: int32 [E], entries of a slot beside each other, in their order.
        edges: int32 [S + 2], where each slot's begin.
        work: int32 [capacity, 3]: slot, first place in `order` and count; a count of 0: no work.
    """

    order: Tensor
    edges: Tensor
    work: Tensor


@triton.jit
def _key(p_slots, p_tokens, o_e, E, T, S):
    """The slot of each entry; S where it has no adapter, S + 1 past the last entry."""
    m_e = o_e < E
    b_slot = tl.load(p_slots + o_e, mask=m_e, other=0)
    m_none = (b_slot < 0) | (b_slot >= S)
    if p_tokens is not None:
        b_token = tl.load(p_tokens + o_e, mask=m_e, other=0)
        m_none = m_none | (b_token < 0) | (b_token >= T)
    return tl.where(m_e, tl.where(m_none, S, b_slot), S + 1)


@triton.jit
def _gather_bucket_kernel(
    p_slots,
    p_tokens,
    p_order,
    p_edges,
    p_work,
    E,
    T,
    S,
    capacity,
    block_m,
    BLOCK: tl.constexpr,
):
    """order[edges[g] : edges[g + 1]] = the entries of slot g in their order, S for those of none;
    work: (slot, first place in order, count) of its chunks of block_m, and counts of 0 between.

    A slot's chunks begin in `work` behind the most chunks that the slots below it can make, so that
    no program waits for another: those slots' entries, and a part of a chunk for each of them.

    Shapes: slots[E] tokens[E] order[E] edges[S + 2] work[capacity, 3]. Grid: [S + 1]. Integers.
    """
    g = tl.program_id(0)
    o_i = tl.arange(0, BLOCK)
    first = 0
    count = 0
    for e0 in range(0, E, BLOCK):
        b_key = _key(p_slots, p_tokens, e0 + o_i, E, T, S)  # [BLOCK]
        first += tl.sum((b_key < g).to(tl.int32), axis=0)
        count += tl.sum((b_key == g).to(tl.int32), axis=0)
    place = first
    for e0 in range(0, E, BLOCK):
        b_key = _key(p_slots, p_tokens, e0 + o_i, E, T, S)  # [BLOCK]
        b_own = (b_key == g).to(tl.int32)
        o_order = place + tl.cumsum(b_own, axis=0) - 1
        tl.store(p_order + o_order, e0 + o_i, mask=b_key == g)
        place += tl.sum(b_own, axis=0)
    tl.store(p_edges + g, first)
    if g == S:
        tl.store(p_edges + g + 1, first + count)
    begin = (first + tl.minimum(g, first) * (block_m - 1)) // block_m
    end = first + count
    end = (end + tl.minimum(g + 1, end) * (block_m - 1)) // block_m
    end = tl.where(g == S, capacity, end)
    for c0 in range(begin, end, BLOCK):
        o_c = c0 + o_i
        m_c = o_c < end
        b_first = (o_c - begin) * block_m
        b_count = tl.minimum(tl.maximum(count - b_first, 0), block_m)
        o_work = o_c * 3
        tl.store(p_work + o_work, tl.zeros_like(o_c) + g, mask=m_c)
        tl.store(p_work + o_work + 1, first + b_first, mask=m_c)
        tl.store(p_work + o_work + 2, b_count, mask=m_c)


def bucket_by_slot(
    slots: Tensor, tokens: Tensor | None, tokens_count: int, slots_count: int, block: int
) -> Chunks:
    """The entries of each slot in chunks of at most `block`."""
    count = slots.shape[0]
    most = capacity(count, slots_count, block)
    sizes = ((count,), (slots_count + 2,), (most, 3))
    made = Chunks(*(slots.new_empty(size) for size in sizes))
    run(
        _gather_bucket_kernel,
        (slots_count + 1,),
        4,
        1,
        p_slots=slots,
        p_tokens=tokens,
        p_order=made.order,
        p_edges=made.edges,
        p_work=made.work,
        E=count,
        T=tokens_count,
        S=slots_count,
        capacity=most,
        block_m=block,
        BLOCK=BUCKET_BLOCK,
    )
    return made
