"""Many adapters on an embedding: what is read by token, and the gradient of A by token.

A is stored by token, a [P, V, 16], so that the 16 ranks of a page lie side by side.
"""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.tiles import cast
from lora_kernels.ops.common.triton_host import run, stride
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.tiles import PAGE, rank_of, slot_of

_BLOCK_N = 1024
_RUN = 32  # tokens of a run that are added together


@triton.jit
def _gather_embed_read_kernel(
    p_ids,
    p_slots,
    p_a,
    p_weight,
    p_table,
    p_ranks,
    p_s,
    p_own,
    p_y,
    V,
    N,
    S,
    C,
    stride_wv,
    stride_wn,
    stride_s,
    BN: tl.constexpr,
):
    """y[t] = weight[id], bit for bit; s[t, 16 c + j] = a[page, id, j] over the pages of t's slot, 0
    past its rank; own[t] its slot. An id that is not there: zeros, and no slot.

    Shapes: ids[T] slots[T] a[P, V, 16] weight[V, N] s[T, 16 C] own[T] y[T, N]; y and weight, or
        neither. Grid: [T, cdiv(N, BN)], the first column of which writes s.
    """
    t = tl.program_id(0).to(tl.int64)
    token = tl.load(p_ids + t).to(tl.int64)
    there = (token >= 0) & (token < V)
    if p_y is not None:
        o_n = tl.program_id(1) * BN + tl.arange(0, BN)
        p_row = p_weight + token * stride_wv
        m_n = o_n < tl.where(there, N, 0)
        b_row = tl.load(p_row + o_n.to(tl.int64) * stride_wn, mask=m_n, other=0.0)  # [BN]
        tl.store(p_y + t * N + o_n, b_row, mask=o_n < N)
    if tl.program_id(1) == 0:
        slot = slot_of(p_slots, None, t, S, 0)
        slot = tl.where(there, slot, -1)
        rank = rank_of(p_ranks, slot, C)
        tl.store(p_own + t, slot)
        o_j = tl.arange(0, PAGE)
        for c in range(0, C):
            b_s = tl.full([PAGE], 0.0, tl.float32)  # [16]
            if rank > c * PAGE:
                page = tl.load(p_table + slot * C + c).to(tl.int64)
                p_ranks_of = p_a + (page * V + token) * PAGE
                b_s = tl.load(p_ranks_of + o_j, mask=o_j < rank - c * PAGE, other=0.0).to(
                    tl.float32
                )
            tl.store(p_s + t * stride_s + c * PAGE + o_j, b_s)


def read(
    ids: Tensor,
    p: RankPages,
    slots: Tensor,
    weight: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Entries]:
    """s [T, ranks] in fp32 and the entries of tokens whose id is there; y takes weight's rows."""
    tokens, n = ids.shape[0], p.b.shape[2]
    s = p.scales.new_empty((tokens, p.width))
    own = slots.new_empty(tokens)
    run(
        _gather_embed_read_kernel,
        (tokens, 1 if y is None else max(1, ceil(n / _BLOCK_N))),
        4,
        1,
        p_ids=ids.contiguous(),
        p_slots=slots.contiguous(),
        p_a=p.a,
        p_weight=weight,
        p_table=p.table,
        p_ranks=p.ranks,
        p_s=s,
        p_own=own,
        p_y=y,
        V=p.a.shape[1],
        N=n,
        S=p.slots,
        C=p.table.shape[1],
        stride_wv=stride(weight, 0),
        stride_wn=stride(weight, 1),
        stride_s=p.width,
        BN=_BLOCK_N,
    )
    return s, Entries([own], tokens, p.slots)


@triton.jit
def _gather_embed_grad_kernel(
    p_u,
    p_ids,
    p_slots,
    p_order,
    p_first,
    p_end,
    p_out,
    p_table,
    p_ranks,
    p_scales,
    V,
    C,
    stride_u,
    BLOCK: tl.constexpr,
):
    """out[page, id, j] = scale · Σ_t u[t, 16 c + j] over the tokens t of a slot with that id.

    Shapes: u[T, ..] out[P, V, 16]; order holds the tokens by slot and id, in their order: those of
        place i are order[first[i] : end[i]]. Grid: [T, C]; the first place of each run adds it.
        Shrunk in fp32.
    """
    i = tl.program_id(0)
    first = tl.load(p_first + i)
    t = tl.load(p_order + i)
    slot = tl.load(p_slots + t)
    rank = rank_of(p_ranks, slot, C)
    column = tl.program_id(1) * PAGE
    if (first == i) & (rank > column):
        o_j = tl.arange(0, PAGE)
        m_j = o_j < rank - column
        b_sum = tl.full([PAGE], 0.0, tl.float32)  # [16]
        last = tl.load(p_end + i)
        for i0 in range(i, last, BLOCK):
            o_i = i0 + tl.arange(0, BLOCK)
            b_t = tl.load(p_order + o_i, mask=o_i < last, other=0)  # [BLOCK]
            o_u = b_t.to(tl.int64)[:, None] * stride_u + (column + o_j)[None, :]
            m_u = (o_i < last)[:, None] & m_j[None, :]
            b_sum += tl.sum(tl.load(p_u + o_u, mask=m_u, other=0.0), axis=0)
        b_sum *= tl.load(p_scales + slot)
        page = tl.load(p_table + slot * C + tl.program_id(1)).to(tl.int64)
        token = tl.load(p_ids + t).to(tl.int64)
        p_row = p_out + (page * V + token) * PAGE
        tl.store(p_row + o_j, cast(b_sum, p_out.dtype.element_ty), mask=m_j)


def grad_a(u: Tensor, ids: Tensor, da: Tensor, p: RankPages, entries: Entries) -> None:
    """da [P, V, 16] from u [T, ranks]: the tokens of a slot with one id beside each other."""
    vocabulary = p.a.shape[1]
    keys = entries.slots.long() * vocabulary + ids
    keys = keys.masked_fill(entries.slots < 0, -1)  # there ids may be anything
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, keys, out_int32=True)
    end = torch.searchsorted(keys, keys, right=True, out_int32=True)
    run(
        _gather_embed_grad_kernel,
        (entries.count, p.table.shape[1]),
        1,
        1,
        p_u=u,
        p_ids=ids.contiguous(),
        p_slots=entries.slots,
        p_order=order.int(),
        p_first=first,
        p_end=end,
        p_out=da,
        p_table=p.table,
        p_ranks=p.ranks,
        p_scales=p.scales,
        V=vocabulary,
        C=p.table.shape[1],
        stride_u=u.stride(0),
        BLOCK=_RUN,
    )
