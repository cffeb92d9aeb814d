"""Arguments of the multi-adapter ops of an embedding: k is the vocabulary, n the width; sorted
slots come with int32 ids. What an op must not read is NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tools.op_inputs.gather import Gather, pages_for, slots_for
from tools.op_inputs.source import Source, strided


def forward(c: Gather, r: Source) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor]:
    """ids, weight, pages, slots"""
    pages = pages_for(c, 0, r)
    pages[0] = pages[0].transpose(1, 2).contiguous()
    ids = r.integers(0, c.k, c.t, torch.int64)
    ids = ids.int() if c.slots == "sorted" else ids
    weight = _rows(c, c.k, r) if c.base else None
    return ids, weight, pages, slots_for(c, c.t, r)


def _rows(c: Gather, count: int, r: Source) -> Tensor:
    return strided(r.normal(count, c.n[0], dtype=c.dtype), c.strides)


def add(c: Gather, r: Source) -> tuple[Any, ...]:
    """out, ids, pages, slots"""
    ids, _, pages, slots = forward(c, r)
    return _rows(c, c.t, r), ids, pages, slots


def backward(c: Gather, r: Source) -> tuple[Any, ...]:
    """dy, ids, pages, slots, needs"""
    needs = [c.needs is None or i in c.needs for i in range(3)]
    return *add(c, r), needs
