"""Inputs of the multi-adapter ops of an embedding; what they must not read is NaN."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.ops.case import DTYPES, Case, Source, dtype_name, strided
from tests.ops.gather_inputs import FP32, RANKS, Gather, _pages, _slots

RAGGED = (1, 7, 16, 17, 64)
# k is the vocabulary, n the width; sorted slots come with int32 ids.
CALLS = {
    "plain": Gather(),
    "base": Gather(base="dense"),
    "fp32-pages": Gather(page_dtype=FP32, base="dense"),
    "fp16-pages": Gather(t=21, page_dtype=torch.float16, ranks=RAGGED, base="dense"),
    "bf16-pages": Gather(page_dtype=torch.bfloat16, slots="sorted", base="dense"),
    "no-adapter": Gather(slots="none", base="dense"),
    "no-token": Gather(t=0, base="dense"),
    "last-slot": Gather(slots="last", ranks=(5, 0, 18)),
    "repeated-ids": Gather(t=70, k=3, n=(130,), ranks=(40, 7, 17), base="dense"),
    "one-slot": Gather(t=33, slots="one"),
    "ranks": Gather(t=40, k=130, n=(97,), ranks=RANKS, slots="sorted", base="dense"),
    "ragged": Gather(t=37, k=29, n=(67,), ranks=RAGGED, base="dense"),
    "ragged-fp32-pages": Gather(t=37, k=5, ranks=RAGGED, slots="sorted", page_dtype=FP32),
    "wide": Gather(t=6, k=9, n=(1030,), ranks=(16, 5, 20), base="dense"),
    "no-width": Gather(n=(0,), base="dense"),
    "transposed": Gather(base="dense", strides="transposed"),
    "padded-rows": Gather(base="dense", strides="padded-rows"),
    "rank-0": Gather(ranks=(0, 0), base="dense"),
    "narrow": Gather(k=1, n=(1,), ranks=(1, 2)),
}
CORE = ("base", "plain", "no-token")


def _forward(
    c: Gather, dtype: torch.dtype, r: Source
) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor]:
    """ids, weight, pages, slots"""
    pages = _pages(c, 0, c.page_dtype or dtype, r)
    pages[0] = pages[0].transpose(1, 2).contiguous()
    ids = torch.randint(0, c.k, (c.t,), generator=r.generator)
    ids = ids.int() if c.slots == "sorted" else ids
    weight = _rows(c, c.k, dtype, r) if c.base else None
    return ids, weight, pages, _slots(c, c.t, r)


def _rows(c: Gather, count: int, dtype: torch.dtype, r: Source) -> Tensor:
    rows = r.normal(count, c.n[0], dtype=dtype)
    return strided(rows, c.strides) if c.strides else rows


def _add(c: Gather, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """out, ids, pages, slots"""
    ids, _, pages, slots = _forward(c, dtype, r)
    return _rows(c, c.t, dtype, r), ids, pages, slots


def _backward(c: Gather, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """dy, ids, pages, slots, needs"""
    needs = [c.needs is None or i in c.needs for i in range(3)]
    return *_add(c, dtype, r), needs


def _cases(op: str, make: Any) -> Iterator[Case]:
    for dtype, (name, c) in itertools.product(DTYPES, CALLS.items()):
        yield Case(
            op,
            f"{dtype_name(dtype)}-{name}",
            lambda r, c=c, d=dtype: make(c, d, r),
            core=name in CORE and dtype is torch.bfloat16,
        )


def gather_lora_embed_fwd() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_fwd", _forward)


def gather_lora_embed_add() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_add", _add)


def gather_lora_embed_bwd() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_bwd", _backward)
    for i in range(3):  # one gradient at a time
        c = Gather(needs=(i,))
        yield Case("gather_lora_embed_bwd", f"needs-only-{i}", lambda r, c=c: _backward(c, FP32, r))
