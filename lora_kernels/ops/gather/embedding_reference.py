"""Many adapters on an embedding in plain PyTorch: the oracle, and what runs on every device.

Everything is computed in y's dtype, except rank-wide results (`ops/common/rank.py`) and the sums of
the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.gather.embedding_schema import (
    GatherEmbedAdd,
    GatherEmbedBackward,
    GatherEmbedForward,
)
from lora_kernels.ops.gather.pages import PAGE, RankPages, pages_of
from lora_kernels.ops.gather.reference import _check_range
from lora_kernels.ops.lora.reference import shrink


class _Group(NamedTuple):
    """The tokens of one slot: which, their ids and s = A[:, id]; its pages, B and scale."""

    slot: int
    tokens: Tensor  # int64 [G]
    ids: Tensor  # int64 [G]
    s: Tensor  # [G, r]
    pages: Tensor  # int64 [C]
    b: Tensor  # [r, D]
    scale: Tensor


def _groups(
    ids: Tensor, pages: Sequence[Tensor], slots: Tensor, dtype: torch.dtype
) -> Iterator[_Group]:
    p = RankPages(*pages)
    p.check_values()
    _check_range("slots", slots, -1, p.slots)
    _check_range("ids", ids, 0, p.a.shape[1])
    for slot in slots.unique().tolist():
        rank = int(p.ranks[slot]) if slot >= 0 else 0
        if rank == 0:
            continue
        tokens = (slots == slot).nonzero().flatten()
        own, found = p.table[slot, : pages_of(rank)].long(), ids[tokens].long()
        # A copy: matrix products of the CPU read past a row's end, where NaN may stand.
        s = p.a[own, found[:, None]].flatten(1)[:, :rank].contiguous()  # [G, C, 16] to [G, r]
        b = p.b[own].flatten(0, 1)[:rank]
        rank_wide = rank_dtype(dtype)
        s, b = (t.to(dtype).to(rank_wide) for t in (s, b))
        yield _Group(slot, tokens, found, s, own, b, p.scales[slot].to(rank_wide))


@register_reference
def gather_lora_embed_fwd(c: GatherEmbedForward) -> Tensor:
    """y[t] = weight[id_t] + scale·A[:, id_t]ᵀ·Bᵀ; rows without adapter are the weight's."""
    ids, weight = c.ids, c.weight
    dtype = c.pages[0].dtype if weight is None else weight.dtype
    parts = [(g.tokens, g.scale * (g.s @ g.b)) for g in _groups(ids, c.pages, c.slots, dtype)]
    if weight is None:
        y = torch.zeros(ids.shape[0], c.pages[1].shape[2], dtype=dtype, device=ids.device)
    else:
        y = F.embedding(ids, weight)
    for tokens, z in parts:
        y[tokens] = (y[tokens] + z).to(dtype)
    return y


@register_reference
def gather_lora_embed_add(c: GatherEmbedAdd) -> None:
    """out += the adapters' part of y; rows without adapter are left alone."""
    out, groups = c.out, _groups(c.ids, c.pages, c.slots, c.out.dtype)
    parts = [(g.tokens, g.scale * (g.s @ g.b)) for g in groups]
    for tokens, z in parts:
        out[tokens] = (out[tokens] + z).to(out.dtype)


@register_reference
def gather_lora_embed_bwd(c: GatherEmbedBackward) -> tuple[Tensor, Tensor, Tensor]:
    """The derivation stands in `embedding.py`."""
    dy, needs, p = c.dy, c.needs, RankPages(*c.pages)
    wide = torch.promote_types(torch.promote_types(dy.dtype, p.a.dtype), torch.float32)
    da, db, dscales = (torch.zeros_like(t, dtype=wide) for t in (p.a, p.b, p.scales))
    for g in _groups(c.ids, c.pages, c.slots, dy.dtype):
        dz, rank = dy[g.tokens], g.b.shape[0]
        u = shrink(dz, g.b.T)  # [G, r]
        pad = len(g.pages) * PAGE - rank
        if needs[0]:
            ds = F.pad((g.scale * u).to(wide), (0, pad))
            # Sums in a fixed order, which index_add does not promise.
            rows = torch.ops.aten.embedding_dense_backward(ds, g.ids, p.a.shape[1], -1, False)
            da[g.pages] = rows.unflatten(1, (-1, PAGE)).transpose(0, 1)
        if needs[1]:
            rows = (g.scale * g.s).to(wide).T @ dz.to(wide)
            db[g.pages] = F.pad(rows, (0, 0, 0, pad)).unflatten(0, (-1, PAGE))
        dscales[g.slot] = (u.to(wide) * g.s.to(wide)).sum()
    grads = zip((da, db, dscales), needs, (p.a, p.b, p.scales), strict=True)
    a, b, scales = ((grad if want else grad.new_empty(0)).to(t.dtype) for grad, want, t in grads)
    return a, b, scales
