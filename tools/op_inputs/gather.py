"""Inputs of the multi-adapter ops.

What an op must not read is NaN: pages that no slot names, and the ranks of a page past an
adapter's own. Pages of a slot are scattered over the pool, in no order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.gather.pages import PAGE, pages_of
from lora_kernels.ops.gather.schema import Needs, sums_width
from tests.ops.case import DTYPES, Case, Source, dtype_name, strided

SEEDS = (7, -1234567890123456789, 3)


@dataclass(frozen=True)
class Gather:
    """A call over T tokens: the ranks of each slot (of each projection, where they differ), how
    tokens choose slots, and what else there is."""

    t: int = 13
    k: int = 40
    n: tuple[int, ...] = (48,)
    ranks: tuple[int, ...] = (3, 16, 1, 40)
    missing: tuple[tuple[int, int], ...] = ()  # (projection, slot) without adapter
    slots: str = "any"  # none, last, one, sorted
    base: str = ""
    bias: bool = False
    mixture: int = 0  # entries
    dropout: tuple[float, ...] = ()  # of slot 0, 1, ..., over again
    page_dtype: torch.dtype | None = None
    strides: str = ""
    spare: int = 3  # pages that nobody uses
    needs: tuple[int, ...] | None = None  # positions in `needs`


QKV = Gather(n=(64, 24, 9), missing=((1, 0), (2, 3), (2, 1)), ranks=(8, 17, 3, 33))
RANKS = (1, 3, 8, 12, 24, 48, 96, 200, 256)
FP32 = torch.float32
CALLS = {
    "plain": Gather(),
    "base": Gather(base="dense", bias=True),
    "bias-alone": Gather(bias=True),
    "nf4": Gather(base="nf4-nested", bias=True, page_dtype=FP32, dropout=(0.3, 0.0, 0.9)),
    "dropout": Gather(dropout=(0.25, 0.0)),
    "qkv": Gather(
        base="dense", dropout=(0.5,), **{f: getattr(QKV, f) for f in ("n", "missing", "ranks")}
    ),
    "mixture": Gather(mixture=31, base="dense", dropout=(0.1,)),
    "qkv-mixture": Gather(mixture=9, n=QKV.n, missing=QKV.missing, ranks=QKV.ranks),
    "fp32-pages": Gather(page_dtype=FP32, base="dense"),
    "no-adapter": Gather(slots="none", base="dense", bias=True),
    "no-token": Gather(t=0, base="dense"),
    "no-entry": Gather(mixture=0, slots="empty"),
    "last-slot": Gather(slots="last", ranks=(5, 0, 18)),
    "few-slots": Gather(t=70, k=97, n=(130,), ranks=(40, 7, 17), base="dense", dropout=(0.2, 0.0)),
    "mixed-mixture": Gather(t=20, k=70, n=(67,), ranks=RANKS, mixture=90),
    "one-slot": Gather(t=33, slots="one", base="dense"),
    "ranks": Gather(t=40, k=130, n=(97,), ranks=RANKS, slots="sorted"),
    "mixed-ranks": Gather(t=70, k=97, n=(130,), ranks=RANKS[::-1], dropout=(0.1, 0.0)),
    "rank-0": Gather(ranks=(0, 0), base="dense"),
    "odd": Gather(k=33, n=(7,), ranks=(2, 5)),
    "narrow": Gather(k=1, n=(1,), ranks=(1, 2)),
    "wide": Gather(t=6, k=1100, n=(1030,), ranks=(16, 5, 20)),
    "no-input": Gather(k=0, base="dense", bias=True, dropout=(0.2,)),
    "no-input-nf4": Gather(k=0, base="nf4"),
    "no-output": Gather(n=(0,), base="dense", bias=True),
    "no-output-of-one": Gather(n=(0, 24, 9), missing=((1, 0),), base="nf4", dropout=(0.2,)),
    "transposed": Gather(strides="transposed", dropout=(0.2,)),
    "padded-rows": Gather(strides="padded-rows", base="dense"),
}
CORE = ("base", "qkv", "mixture", "no-token")


def _pages(c: Gather, projection: int, dtype: torch.dtype, r: Source) -> list[Tensor]:
    """a, b, table, ranks, scales"""
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
            a[page, :rows] = r.normal(rows, c.k, dtype=dtype, std=max(c.k, 1) ** -0.5)
            b[page, :rows] = r.normal(rows, c.n[projection], dtype=dtype, std=rank**-0.5)
    scales = r.normal(len(ranks)).abs() + 0.25
    return [a, b, table, torch.tensor(ranks, dtype=torch.int32), scales]


def _slots(c: Gather, count: int, r: Source) -> Tensor:
    s = len(c.ranks)
    if c.slots == "none":
        return torch.full((count,), -1, dtype=torch.int32)
    if c.slots in ("last", "one"):
        return torch.full((count,), s - 1 if c.slots == "last" else 1, dtype=torch.int32)
    slots = torch.randint(-1, s, (count,), generator=r.generator, dtype=torch.int32)
    return slots.sort().values if c.slots == "sorted" else slots


def _entries(c: Gather, r: Source) -> list[Tensor]:
    if not c.mixture and c.slots != "empty":
        return [_slots(c, c.t, r)]
    count = c.mixture
    tokens = torch.randint(0, c.t, (count,), generator=r.generator, dtype=torch.int32)
    return [_slots(c, count, r), tokens, torch.rand(count, generator=r.generator) + 0.25]


def _dropout(c: Gather, entries: int, r: Source) -> list[Tensor]:
    if not c.dropout:
        return []
    s = len(c.ranks)
    thresholds = [round(65536 * c.dropout[i % len(c.dropout)]) for i in range(s)]
    return [
        torch.tensor([SEEDS[i % len(SEEDS)] for i in range(s)]),
        torch.tensor(thresholds, dtype=torch.int32),
        torch.randint(0, 1000, (entries,), generator=r.generator, dtype=torch.int32),
    ]


def _forward(c: Gather, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """x, base, meta, bias, pages, entries, dropout"""
    total = sum(c.n)
    x = r.normal(c.t, c.k, dtype=dtype)
    base, meta = r.base(c.base, total, c.k, dtype) if c.base else ([], [total, c.k])
    pages = [t for i in range(len(c.n)) for t in _pages(c, i, c.page_dtype or dtype, r)]
    entries = _entries(c, r)
    bias = r.normal(total, dtype=dtype) if c.bias else None
    x = strided(x, c.strides) if c.strides else x
    return x, base, meta, bias, pages, entries, _dropout(c, entries[0].shape[0], r)


def _add(c: Gather, dtype: torch.dtype, r: Source, overwrite: bool) -> tuple[Any, ...]:
    """out, x, pages, entries, overwrite"""
    x, _, meta, _, pages, entries, _ = _forward(c, dtype, r)
    out = r.normal(c.t, meta[0], dtype=dtype)
    return out if c.base else strided(out, "padded-rows"), x, pages, entries, overwrite


def _backward(c: Gather, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, pages, entries, dropout, needs"""
    x, base, meta, bias, pages, entries, dropout = _forward(c, dtype, r)
    dy = r.normal(c.t, meta[0], dtype=dtype)
    dy = strided(dy, c.strides) if c.strides else dy
    (_, s), p = (
        torch.ops.lora_kernels.gather_lora_fwd(x, base, meta, bias, pages, entries, dropout),
        len(c.n),
    )
    assert s.shape[1] == sums_width(pages)
    every = [True] * p
    needs = Needs(True, bias is not None, len(entries) > 1, every, every, every).pack()
    if c.needs is not None:
        needs = [i in c.needs for i in range(len(needs))]
    return dy, x, s, base, meta, pages, entries, dropout, needs


def _cases(op: str, make: Any, **more: Any) -> Iterator[Case]:
    for dtype, (name, c) in itertools.product(DTYPES, CALLS.items()):
        yield Case(
            op,
            "-".join((dtype_name(dtype), name, *(k for k, v in more.items() if v))),
            lambda r, c=c, d=dtype: make(c, d, r, **more),
            core=name in CORE and dtype is torch.bfloat16,
        )


def gather_lora_fwd() -> Iterator[Case]:
    yield from _cases("gather_lora_fwd", _forward)


def gather_lora_add() -> Iterator[Case]:
    for overwrite in (False, True):
        yield from _cases("gather_lora_add", _add, overwrite=overwrite)


def gather_lora_bwd() -> Iterator[Case]:
    yield from _cases("gather_lora_bwd", _backward)
    for i in range(3 + 3 * 3):  # one gradient at a time
        c = Gather(n=QKV.n, bias=True, mixture=20, dropout=(0.1,), needs=(i,))
        yield Case("gather_lora_bwd", f"needs-only-{i}", lambda r, c=c: _backward(c, FP32, r))
