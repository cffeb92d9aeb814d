"""The ways that ops with Triton kernels can be run, by their names."""

from __future__ import annotations

from contextlib import AbstractContextManager

from lora_kernels.ops.common.strategies import STRATEGIES, use_strategy
from lora_kernels.ops.gather.triton.fused_epilogue import BASES, use_base
from lora_kernels.ops.gather.triton.plan import SCHEDULES, use_schedule

NAMES = (*STRATEGIES, *SCHEDULES, *BASES)


def use(name: str | None) -> AbstractContextManager[None]:
    """Run by a strategy, a way to cut many adapters or to add them to a base, until the block
    ends."""
    if name in SCHEDULES:
        return use_schedule(name)
    return use_base(name) if name in BASES else use_strategy(name)
