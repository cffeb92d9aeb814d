"""Every call for the compiled kernels.

A family joins with its makers, which turn a problem and a source of numbers into an op's arguments:
in `LAYERS` where the problems of one layer fit it, else in `calls` with problems of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.tuned import triton_version
from tests.compiled import (
    dora_problems,
    gather_problems,
    glu_problems,
    nf4_problems,
    packed_problems,
    problems,
)
from tests.ops.case import Case
from tools.op_inputs.source import Source

# The release that every commit is tested on. A sample on another one is drawn by target alone.
DEVELOPED_ON = "3.9."


def on_another_release() -> bool:
    """Whether the Triton here is not the one of every commit."""
    return not triton_version().startswith(DEVELOPED_ON)


class Tiled(Protocol):
    """What a problem says beside its sizes; `tiles` by compute capability are forced on the
    products in it, `strategies` on their order."""

    name: str
    tiles: dict[int, GemmConfig]
    strategies: tuple[str | None, ...]
    slow: bool


Makers = dict[str, Callable[[Any, Source], tuple[Any, ...]]]
LAYERS: Makers = {**problems.MAKERS}


def calls() -> Iterator[tuple[Tiled, Case]]:
    """Every problem of every op."""
    yield from _calls(LAYERS, problems.PROBLEMS, problems.ONE_GRADIENT)
    # DoRA runs one way, whatever the strategy.
    one_way = tuple(replace(p, strategies=(None,)) for p in problems.PROBLEMS)
    yield from _calls(dora_problems.MAKERS, (*one_way, *dora_problems.QUANTISED))
    yield from _calls(packed_problems.MAKERS, packed_problems.PROBLEMS, packed_problems.NEEDS)
    yield from _calls(packed_problems.MAKERS, packed_problems.QUANTISED)
    yield from _calls(glu_problems.MAKERS, glu_problems.PROBLEMS)
    yield from _calls(nf4_problems.CODEC_MAKERS, nf4_problems.CODEC)
    yield from _calls(nf4_problems.BASE_MAKERS, nf4_problems.BASE)
    yield from _calls(nf4_problems.LORA_MAKERS, nf4_problems.LORA)
    over = (*gather_problems.PROBLEMS, *gather_problems.OVER)
    yield from _calls(gather_problems.BOTH_WAYS, over)
    forward = (*gather_problems.FUSED, *gather_problems.SCATTERED)
    yield from _calls(gather_problems.FORWARD, forward)
    yield from _calls(gather_problems.EMBED, gather_problems.EMBEDDING)
    yield from _calls(gather_problems.EMBED_ADD, gather_problems.EMBEDDING[:1])
    yield from _calls(gather_problems.ADDS, gather_problems.PROBLEMS)


def _calls(
    makers: Makers, both: tuple[Tiled, ...], backward: tuple[Tiled, ...] = ()
) -> Iterator[tuple[Tiled, Case]]:
    for op, make in makers.items():
        for p in both + backward if op.endswith("_bwd") else both:
            exact = getattr(p, "exact", False)
            yield p, Case(op, p.name, lambda r, p=p, make=make: make(p, r), exact=exact)
