"""The entries of a call, and their chunks by slot. Both stay on the device: the host reads nothing
back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.gather.triton.bucket_by_slot import Chunks, bucket_by_slot
from lora_kernels.ops.gather.triton.plan import capacity

# Programs beside those of full chunks: what a large GPU runs at once.
_SPARE_PROGRAMS = 128


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
            self._chunks[block] = bucket_by_slot(
                self.slots, self.tokens, self.tokens_count, self.slots_count, block
            )
        return self._chunks[block]

    def programs(self, block: int, beside: int) -> int:
        """How many programs to launch over the chunks, where each chunk takes `beside` of them:
        enough for full chunks, and a GPU's worth more for those that are not full."""
        few = ceil(_SPARE_PROGRAMS / max(1, beside))  # none beside: a layer without outputs
        most = capacity(self.count, self.slots_count, block)
        return min(most, ceil(self.count / block) + few)
