"""The ways that ops with Triton kernels can be run, by their names."""

from __future__ import annotations

from contextlib import AbstractContextManager

from lora_kernels.ops.common.strategies import STRATEGIES, use_strategy
from lora_kernels.ops.gather.triton.base_plan import BASES, use_base
from lora_kernels.ops.gather.triton.plan import WAYS, use_way

NAMES = (*STRATEGIES, *WAYS, *BASES)


def use(name: str | None) -> AbstractContextManager[None]:
    """Run by a strategy, a way to cut many adapters or to add them to a base, until the block
    ends."""
    if name in WAYS:
        return use_way(name)
    return use_base(name) if name in BASES else use_strategy(name)
