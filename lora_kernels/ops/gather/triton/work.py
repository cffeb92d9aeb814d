"""Which entries the programs take, found on the device: no value is read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.triton_host import run

# Entries that a program of the list looks at together.
LIST_BLOCK = 1024
# Programs beside those of full chunks: what a large GPU runs at once.
_SPARE_PROGRAMS = 128


def capacity(entries: int, slots: int, block: int) -> int:
    """The most chunks of `block` entries that the slots in use, and those of none, can make."""
    return (entries + min(slots + 1, entries) * (block - 1)) // block


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


class Entries:
    """The entries of a call: one for each token, or a mixture's.

    Attributes:
        slots, tokens, weights: as in `schema.py`; the last two None where entry e is token e.
        tokens_count, slots_count: T and S.
    """

    def __init__(self, entries: Sequence[Tensor], tokens: int, slots: int) -> None:
        self.slots = entries[0].contiguous()
        self.tokens = entries[1].contiguous() if len(entries) > 1 else None
        self.weights = entries[2].contiguous() if len(entries) > 1 else None
        self.tokens_count, self.slots_count = tokens, slots
        self._chunks: dict[int, Chunks] = {}

    @property
    def count(self) -> int:
        return self.slots.shape[0]

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor]:
        """Of a mixture: entries in the order of tokens [E], where each token's begin [T + 1]."""
        assert self.tokens is not None
        ordered, order = self.tokens.sort(stable=True)
        names = torch.arange(self.tokens_count + 1, device=order.device, dtype=ordered.dtype)
        return order, torch.searchsorted(ordered, names, out_int32=True)

    def chunks(self, block: int) -> Chunks:
        """Chunks of at most `block` entries of one slot. Their number depends on E and S alone, so
        that one captured graph serves any mix."""
        if block not in self._chunks:
            self._chunks[block] = self._list(block)
        return self._chunks[block]

    def programs(self, block: int, beside: int) -> int:
        """Programs that walk the chunks where `beside` others do for each: a GPU's worth more than
        full chunks would take, for those that are not."""
        few = ceil(_SPARE_PROGRAMS / max(1, beside))  # none beside: a layer without outputs
        most = capacity(self.count, self.slots_count, block)
        return min(most, ceil(self.count / block) + few)

    def _list(self, block: int) -> Chunks:
        from lora_kernels.ops.gather.triton.listing import _gather_list_kernel

        count, slots = self.count, self.slots_count
        most = capacity(count, slots, block)
        sizes = ((count,), (slots + 2,), (most, 3))
        made = Chunks(*(self.slots.new_empty(size) for size in sizes))
        run(
            _gather_list_kernel,
            (slots + 1,),
            4,
            1,
            p_slots=self.slots,
            p_tokens=self.tokens,
            p_order=made.order,
            p_edges=made.edges,
            p_work=made.work,
            E=count,
            T=self.tokens_count,
            S=slots,
            capacity=most,
            block_m=block,
            BLOCK=LIST_BLOCK,
        )
        return made
