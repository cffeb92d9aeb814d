"""Many adapters in one batch in plain PyTorch: the oracle of every other backend.

Everything is computed in x's dtype, except rank-wide results (`ops/common/rank.py`) and the sums of
the adapters' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.common.philox import keep_bits
from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.gather.pages import PAGE, RankPages, pages_of, split_pages
from lora_kernels.ops.gather.schema import (
    GatherLoRAAdd,
    GatherLoRABackward,
    GatherLoRAForward,
    sums_width,
)
from lora_kernels.ops.lora.reference import shrink
from lora_kernels.ops.nf4.reference import nf4_linear_bwd, nf4_linear_fwd
from lora_kernels.ops.nf4.schema import NF4LinearBackward, NF4LinearForward


class Group:
    """The entries of one slot at one projection, and its adapter.

    Attributes:
        slot, stream: which slot, which projection.
        entries, tokens: int64 [G], which entries and the rows of x that they take.
        pages: int64, the slot's own; a [r, K] and b [r, N] what they hold, in x's dtype.
        scale, weights: of the slot, of each entry [G, 1], in what is rank-wide.
    """

    def __init__(self, p: RankPages, stream: int, slot: int, entries: Sequence[Tensor], x: Tensor):
        self.slot, self.stream = slot, stream
        self.rank = int(p.ranks[slot])
        self.entries = (entries[0] == slot).nonzero().flatten()
        self.tokens = entries[1].long()[self.entries] if len(entries) > 1 else self.entries
        self.pages = p.table[slot, : pages_of(self.rank)].long()
        self.a, self.b = (t[self.pages].flatten(0, 1)[: self.rank].to(x.dtype) for t in (p.a, p.b))
        rank = rank_dtype(x.dtype)
        self.scale = p.scales[slot].to(rank)
        one = x.new_ones(len(self.entries), 1, dtype=rank)
        self.weights = entries[2][self.entries, None].to(rank) if len(entries) > 1 else one

    def drop(self, x: Tensor, dropout: Sequence[Tensor]) -> Tensor:
        """x where the slot's mask keeps it, scaled by 1 / (1 - p); 0 elsewhere."""
        if not dropout or int(dropout[1][self.slot]) == 0:
            return x
        seeds, thresholds, rows = dropout
        bits = keep_bits(seeds[self.slot], rows.long()[self.entries], x.shape[1], self.stream)
        threshold = int(thresholds[self.slot])
        return (x * (1.0 / (1.0 - threshold / 65536))).masked_fill(bits < threshold, 0)


def _groups(
    pages: Sequence[Tensor], entries: Sequence[Tensor], x: Tensor
) -> Iterator[tuple[Group, slice, slice]]:
    """Each slot in use at each projection, with its columns of y and of s."""
    n = r = 0
    for stream, p in enumerate(split_pages(pages)):
        for slot in entries[0].unique().tolist():
            if slot >= 0 and int(p.ranks[slot]) > 0:
                group = Group(p, stream, slot, entries, x)
                yield group, slice(n, n + p.b.shape[2]), slice(r, r + group.rank)
        n += p.b.shape[2]
        r += p.width


def _check_values(pages: Sequence[Tensor], entries: Sequence[Tensor], x: Tensor) -> None:
    projections = split_pages(pages)
    for i, p in enumerate(projections):
        p.check_values(f"pages[{i}]")
    _check_range("slots", entries[0], -1, projections[0].slots)
    if len(entries) > 1:
        _check_range("tokens", entries[1], 0, x.shape[0])


def _check_range(name: str, t: Tensor, low: int, end: int) -> None:
    bad = ((t < low) | (t >= end)).nonzero()
    if bad.numel():
        at = int(bad[0])
        raise ValueError(f"{name}: got {int(t[at])} at {at}, expected {low} to {end - 1}")


@register_reference
def gather_lora_fwd(c: GatherLoRAForward) -> tuple[Tensor, Tensor]:
    """s[e] = drop(x[t])·A[slot]ᵀ;  y[t] = x[t]·Wᵀ + bias + Σ_e weight[e]·scale·s[e]·B[slot]ᵀ."""
    x = c.x
    _check_values(c.pages, c.entries, x)
    y = x.new_zeros(x.shape[0], c.meta[0])
    if c.base:
        y = nf4_linear_fwd(NF4LinearForward(x, c.base, c.meta, c.bias))
    elif c.bias is not None:
        y = y + c.bias
    rank = rank_dtype(x.dtype)
    s = x.new_zeros(c.entries[0].shape[0], sums_width(c.pages), dtype=rank)
    for g, columns, ranks in _groups(c.pages, c.entries, x):
        s[g.entries, ranks] = shrink(g.drop(x[g.tokens], c.dropout), g.a.T)
        z = g.weights * (g.scale * (s[g.entries, ranks] @ g.b.to(rank)))
        y[:, columns] = y[:, columns].to(rank).index_add(0, g.tokens, z).to(x.dtype)
    return y, s


@register_reference
def gather_lora_add(c: GatherLoRAAdd) -> None:
    """out += the adapters' part of y, or out = it."""
    meta = [c.out.shape[1], c.x.shape[1]]
    y, _ = gather_lora_fwd(GatherLoRAForward(c.x, [], meta, None, c.pages, c.entries, []))
    c.out.copy_(y if c.overwrite else c.out + y)


@register_reference
def gather_lora_bwd(
    c: GatherLoRABackward,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The derivation stands in `api.py`."""
    dy, x, entries, dropout = c.dy, c.x, c.entries, c.dropout
    _check_values(c.pages, entries, x)
    projections, want = split_pages(c.pages), c.want
    rank = rank_dtype(x.dtype)
    wide = torch.promote_types(rank, projections[0].a.dtype)
    dx = torch.zeros_like(x)
    if c.base:
        dx = nf4_linear_bwd(NF4LinearBackward(dy, c.base, c.meta))
    gate = projections[0].scales.dtype
    dweights = x.new_zeros(entries[0].shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    da, db, dscales = (
        [torch.zeros_like(t, dtype=torch.promote_types(wide, t.dtype)) for t in found]
        for found in zip(*((p.a, p.b, p.scales) for p in projections), strict=True)
    )
    for g, columns, ranks in _groups(c.pages, entries, x):
        dz, i = dy[g.tokens, columns], g.stream
        own = c.s[g.entries, ranks]
        u = shrink(dz, g.b.T)  # [G, r], gradient of scale · weight · s
        ds = rank_value(g.weights * (g.scale * u), x.dtype)
        dx = dx.to(rank).index_add(0, g.tokens, g.drop(ds @ g.a.to(rank), dropout)).to(x.dtype)
        kept = g.drop(x[g.tokens].to(wide), dropout)
        _put(da[i], g, ds.to(wide).T @ kept)
        _put(db[i], g, (g.weights * (g.scale * own)).to(wide).T @ dz.to(wide))
        product = (u.to(dweights) * own.to(dweights)).sum(1)
        dscales[i][g.slot] += (g.weights[:, 0].to(dweights) * product).sum()
        dweights[g.entries] += g.scale.to(dweights) * product

    def asked(t: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
        return (t if wanted else t.new_empty(0)).to(dtype)

    return (
        asked(dx, want.x, x.dtype),
        asked(dy.sum(0), want.bias, x.dtype),
        asked(dweights, want.weights, gate),
        [asked(t, w, p.a.dtype) for t, w, p in zip(da, want.a, projections, strict=True)],
        [asked(t, w, p.b.dtype) for t, w, p in zip(db, want.b, projections, strict=True)],
        [
            asked(t, w, p.scales.dtype)
            for t, w, p in zip(dscales, want.scales, projections, strict=True)
        ],
    )


def _put(into: Tensor, g: Group, rows: Tensor) -> None:
    """Write an adapter's rows [r, ..] into its pages, zeros past its rank."""
    pad = torch.nn.functional.pad(rows, (0, 0, 0, len(g.pages) * PAGE - g.rank))
    into[g.pages] = pad.unflatten(0, (-1, PAGE)).to(into.dtype)
