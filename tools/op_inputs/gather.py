"""Arguments of the multi-adapter ops.

What an op must not read is NaN: pages that no slot names, and the ranks of a page past an
adapter's own. Pages of a slot are scattered over the pool, in no order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.gather.pages import PAGE, pages_of
from lora_kernels.ops.gather.schema import Needs, sums_width
from tools.op_inputs.source import ANY, BF16, Range, Source, strided

SEEDS = (7, -1234567890123456789, 3)


@dataclass(frozen=True)
class Gather:
    """A call over T tokens: the ranks of each slot (of each projection, where they differ), how
    tokens choose slots, and what else there is."""

    t: int = 13
    k: int = 40
    n: tuple[int, ...] = (48,)
    ranks: tuple[int, ...] = (3, 16, 1, 40)
    dtype: torch.dtype = BF16
    missing: tuple[tuple[int, int], ...] = ()  # (projection, slot) without adapter
    slots: str = "any"  # none, last, one, sorted, in-turn, in-order, empty
    base: str = ""
    bias: bool = False
    mixture: int = 0  # entries
    dropout: tuple[float, ...] = ()  # of slot 0, 1, ..., over again
    page_dtype: torch.dtype | None = None
    strides: str = ""
    spare: int = 3  # pages that nobody uses
    needs: tuple[int, ...] | None = None  # positions in `needs`
    padded: bool = False  # rows of `out` with memory between them
    overwrite: bool = False
    range: Range = ANY


def pages_for(c: Gather, projection: int, r: Source) -> list[Tensor]:
    """a, b, table, ranks, scales"""
    dtype = c.page_dtype or c.dtype
    lost = {slot for i, slot in c.missing if i == projection}
    ranks = [0 if slot in lost else rank for slot, rank in enumerate(c.ranks)]
    columns = max(1, *(pages_of(rank) for rank in c.ranks))
    count = sum(map(pages_of, ranks)) + c.spare
    order = torch.randperm(count, generator=r.generator).tolist()
    a = torch.full((count, PAGE, c.k), torch.nan, dtype=dtype)
    b = torch.full((count, PAGE, c.n[projection]), torch.nan, dtype=dtype)
    table = torch.full((len(ranks), columns), -1, dtype=torch.int32)
    for slot, rank in enumerate(ranks):
        for column in range(pages_of(rank)):
            page, rows = order.pop(), min(PAGE, rank - column * PAGE)
            table[slot, column] = page
            a[page, :rows] = r.weight(rows, c.k, dtype, c.range.a)
            std = c.range.b * rank**-0.5
            b[page, :rows] = r.normal(rows, c.n[projection], dtype=dtype, std=std)
    scales = r.normal(len(ranks)).abs() + 0.25
    return [a, b, table, torch.tensor(ranks, dtype=torch.int32), scales]


def slots_for(c: Gather, count: int, r: Source) -> Tensor:
    s = len(c.ranks)
    if c.slots == "none":
        return torch.full((count,), -1, dtype=torch.int32)
    if c.slots in ("last", "one"):
        return torch.full((count,), s - 1 if c.slots == "last" else 1, dtype=torch.int32)
    if c.slots == "in-turn":
        return torch.arange(count, dtype=torch.int32) % s
    if c.slots == "in-order":
        return (torch.arange(count) * s // count).int()
    slots = r.integers(-1, s, count)
    return slots.sort().values if c.slots == "sorted" else slots


def _entries(c: Gather, r: Source) -> list[Tensor]:
    if not c.mixture and c.slots != "empty":
        return [slots_for(c, c.t, r)]
    count = c.mixture
    tokens = r.integers(0, c.t, count)
    return [slots_for(c, count, r), tokens, torch.rand(count, generator=r.generator) + 0.25]


def _dropout(c: Gather, entries: int, r: Source) -> list[Tensor]:
    if not c.dropout:
        return []
    s = len(c.ranks)
    thresholds = [round(65536 * c.dropout[i % len(c.dropout)]) for i in range(s)]
    return [
        torch.tensor([SEEDS[i % len(SEEDS)] for i in range(s)]),
        torch.tensor(thresholds, dtype=torch.int32),
        r.integers(0, 1000, entries),
    ]


def forward(c: Gather, r: Source) -> tuple[Any, ...]:
    """x, base, meta, bias, pages, entries, dropout"""
    total = sum(c.n)
    x = r.normal(c.t, c.k, dtype=c.dtype, std=c.range.x)
    base, meta = r.base(c.base, total, c.k, c.dtype) if c.base else ([], [total, c.k])
    pages = [t for i in range(len(c.n)) for t in pages_for(c, i, r)]
    entries = _entries(c, r)
    bias = r.normal(total, dtype=c.dtype) if c.bias else None
    dropout = _dropout(c, entries[0].shape[0], r)
    return strided(x, c.strides), base, meta, bias, pages, entries, dropout


def add(c: Gather, r: Source) -> tuple[Any, ...]:
    """out, x, pages, entries, overwrite"""
    x, _, meta, _, pages, entries, _ = forward(c, r)
    out = r.normal(c.t, meta[0], dtype=c.dtype)
    return strided(out, "padded-rows" * c.padded), x, pages, entries, c.overwrite


def backward(c: Gather, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, pages, entries, dropout, needs"""
    x, base, meta, bias, pages, entries, dropout = forward(c, r)
    dy = strided(r.normal(c.t, meta[0], dtype=c.dtype, std=c.range.dy), c.strides)
    if r.hollow:
        s: Tensor = x.new_empty(c.t, sums_width(pages), dtype=rank_dtype(c.dtype))
    else:
        _, s = torch.ops.lora_kernels.gather_lora_fwd(x, base, meta, bias, pages, entries, dropout)
        s = rank_value(s, c.dtype)
    every = [True] * len(c.n)
    needs = Needs(True, bias is not None, len(entries) > 1, every, every, every).pack()
    if c.needs is not None:
        needs = [i in c.needs for i in range(len(needs))]
    return dy, x, s, base, meta, pages, entries, dropout, needs
