"""Every call for the compiled kernels.

A family joins with a line in `FAMILIES` and problems of its own, each with a call that
`tools.op_inputs` turns into the arguments of its ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lora_kernels.ops.common.strategies import STRATEGIES
from lora_kernels.ops.common.tuned import triton_version
from lora_kernels.ops.gather.triton.plan import SCHEDULES
from tests.compiled import dora_problems as dora
from tests.compiled import gather_problems as gather
from tests.compiled import glu_problems as glu
from tests.compiled import nf4_problems as nf4
from tests.compiled import packed_problems as packed
from tests.compiled import problems
from tests.compiled.problems import Problem
from tests.ops.case import Case, case_of

Strategies = tuple[str | None, ...]
# The release that every commit is tested on. A sample on another one is drawn by target alone.
DEVELOPED_ON = "3.9."


def on_another_release() -> bool:
    """Whether the Triton here is not the one of every commit."""
    return not triton_version().startswith(DEVELOPED_ON)


PASSES = STRATEGIES[:2]  # without the vendor's product to add to
# Ops of a family, their problems, those of the backward alone, and the strategies to run them by.
FAMILIES: tuple[tuple[str, tuple[Problem, ...], tuple[Problem, ...], Strategies], ...] = (
    ("lora_linear_fwd lora_linear_bwd", problems.PROBLEMS, problems.ONE_GRADIENT, STRATEGIES),
    ("dora_norm dora_linear_fwd dora_linear_bwd", dora.PROBLEMS, (), (None,)),
    ("lora_packed_fwd lora_packed_bwd", packed.PROBLEMS, packed.NEEDS, PASSES),
    ("lora_packed_fwd lora_packed_bwd", packed.QUANTISED, (), PASSES),
    ("glu_fwd glu_bwd", glu.PROBLEMS, (), (None,)),
    ("nf4_dequantize nf4_quantize nf4_quantize_scales", nf4.CODEC, (), (None,)),
    # Without a branch there is no pass that makes it.
    ("nf4_linear_fwd nf4_linear_bwd", nf4.LORA, (), ("epilogue", "addmm")),
    ("lora_linear_fwd lora_linear_bwd", nf4.LORA, (), STRATEGIES),
    ("gather_lora_fwd gather_lora_bwd", (*gather.PROBLEMS, *gather.OVER), (), SCHEDULES),
    ("gather_lora_fwd", (*gather.FUSED, *gather.SCATTERED), (), SCHEDULES),
    ("gather_lora_embed_fwd gather_lora_embed_bwd", gather.EMBEDDING, (), SCHEDULES),
    ("gather_lora_embed_add", gather.EMBEDDING[:1], (), SCHEDULES),
    ("gather_lora_add", gather.ADDS, (), SCHEDULES),
)


def calls() -> Iterator[tuple[Problem, Case]]:
    """Every problem of every op."""
    for ops, both, backward, strategies in FAMILIES:
        for op in ops.split():
            for p in both + backward if op.endswith("_bwd") else both:
                # The norm of W itself is asked for as well.
                call = replace(p.call, keep_u=False) if op == "dora_norm" else p.call
                case = case_of(op, p.name, call, exact=p.exact)
                yield replace(p, strategies=p.strategies or strategies), case
