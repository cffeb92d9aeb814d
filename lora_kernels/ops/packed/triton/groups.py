"""Which projections share a launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.pick import PER_LAUNCH
from lora_kernels.ops.packed.schema import split_base


def split_weights(base: Sequence[Tensor], meta: Sequence[int]) -> list[Weight]:
    """Each projection's weight."""
    return [Weight(own, m) for own, m, _ in split_base(base, meta)]


def groups(weights: Sequence[Weight]) -> Iterator[range]:
    """The projections of each launch: neighbours whose weights are of one format, so that a
    kernel is compiled for it."""
    first = 0
    for i in range(1, len(weights) + 1):
        full = i == len(weights) or i - first == PER_LAUNCH
        if full or weights[i].meta[2:] != weights[first].meta[2:]:
            yield range(first, i)
            first = i
