"""Groups of arguments that the kernels of many adapters take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels.ops.gather.pages import RankPages


class Mask:
    """The dropout of each slot, for one projection."""

    def __init__(self, dropout: Sequence[Tensor], stream: int) -> None:
        self.seeds, self.thresholds, self.rows = dropout
        self.stream = stream


class SlotMask(NamedTuple):
    """The dropout of each slot [S], and the row of the mask of each entry; None where there is no
    dropout."""

    seeds: Any
    thresholds: Any
    rows: Any
    stream: Any


class Pages(NamedTuple):
    """The rank pages of A or B in `p` [P, 16, ..], and whose they are: table[S, C], ranks[S],
    scales[S]."""

    p: Any
    table: Any
    ranks: Any
    scales: Any
    S: Any
    C: Any


class Shrunk(NamedTuple):
    """s [E, ..], or parts of it to be added [parts, E, ..]: the strides of both."""

    p: Any
    part: Any
    row: Any


def slot_mask(mask: Mask | None) -> SlotMask:
    if mask is None:
        return SlotMask(None, None, None, 0)
    return SlotMask(mask.seeds, mask.thresholds, mask.rows, mask.stream)


def rank_pages(p: RankPages, t: Tensor) -> Pages:
    """t is p.a or p.b, or of their layout."""
    return Pages(t, p.table, p.ranks, p.scales, p.slots, p.table.shape[1])


def shrunk(s: Tensor) -> Shrunk:
    """The last stride of s is 1."""
    return Shrunk(s, s.stride(0) if s.dim() == 3 else 0, s.stride(-2))
