"""Inputs of the gated linear units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from lora_kernels.ops.glu.schema import ACTIVATIONS
from tests.ops.case import Case, case_of, dtype_name, size_name
from tools.op_inputs.glu import Glu
from tools.op_inputs.source import DTYPES, FP32

# Around the vectors' widths and the length of a thread's piece.
SIZES = ((1, 1), (7, 3), (33, 8), (5, 31), (1, 1024), (3, 1100), (0, 9), (4, 0))
STRIDES = ("transposed", "padded-rows", "every-other-column", "expanded")
# Standard deviations of g. Where it is wide, most of an activation is 0 or a straight line, and it
# takes many values to have some in the bend.
WIDTHS = {"": 1.5, "-wide": 20.0}
MANY = 1000


def _calls() -> Iterator[tuple[str, Glu, bool]]:
    """label, call, core"""
    for dtype, size, name, (wide, width) in itertools.product(
        DTYPES, SIZES, ACTIVATIONS, WIDTHS.items()
    ):
        if wide and size[0] * size[1] < MANY:
            continue
        core = size in ((5, 31), (0, 9)) and not wide and dtype is FP32
        label = f"{dtype_name(dtype)}-{size_name(*size)}-{name}{wide}"
        yield label, Glu(size, name, dtype, width), core
    for dtype, kind in itertools.product(DTYPES, STRIDES):
        call = Glu((6, 19), ACTIVATIONS[0], dtype, 1.0, kind)
        yield f"{dtype_name(dtype)}-{kind}", call, dtype is DTYPES[2]


def glu_fwd() -> Iterator[Case]:
    for label, call, core in _calls():
        yield case_of("glu_fwd", label, call, core=core)


def glu_bwd() -> Iterator[Case]:
    for (label, call, core), need_h in itertools.product(_calls(), (True, False)):
        call = replace(call, need_h=need_h)
        yield case_of("glu_bwd", label + "-h" * need_h, call, core=core)
