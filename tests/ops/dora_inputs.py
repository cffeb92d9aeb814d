"""Inputs of the DoRA ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.ops.case import WIDE_BASES, WIDE_SHAPES, Case, case_of, dtype_name, size_name
from tools.op_inputs.dora import Dora
from tools.op_inputs.source import BASES, BF16, DTYPES, FP16, FP32, RANGES, Range

# M, N, K, R: single rows and columns, no rows, outputs or inputs, K that is no multiple of 8.
SHAPES = (
    (0, 16, 24, 3),
    (5, 0, 24, 3),
    (5, 16, 0, 3),
    (1, 64, 128, 16),
    (7, 20, 31, 1),
    (33, 129, 257, 17),
    (65, 1, 40, 3),
    (5, 33, 1, 2),
)
SMALL = (5, 12, 20, 3)
# What a call may have besides sizes, dtype and base.
Options = dict[str, Any]
ALL: Options = {"bias": True, "dropout": 0.5, "adapter": FP32}
OPTIONS: dict[str, Options] = {
    "plain": {},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.25},
    "fp32-adapters": {"adapter": FP32},
    "all": ALL,
}
SPECIAL: dict[str, Options] = {
    "zero-rows": {"rows": "zero"},
    "zero-rows-all": {**ALL, "rows": "zero"},
    "flat-rows": {"rows": "flat"},
    "flat-rows-all": {**ALL, "rows": "flat"},
    "kept-nothing": {"keep_u": False},
    "kept-nothing-all": {**ALL, "keep_u": False},
    "transposed": {"bias": True, "dropout": 0.25, "strides": "transposed"},
    "padded-rows": {"strides": "padded-rows"},
}
WIDE: dict[str, Options] = {
    f"{name}-{kind}": {**o, "range": of}
    for name, of in (RANGES | {"wide-z": Range(x=2.0**5, w=2.0**12, magnitude=2.0**-7)}).items()
    for kind, o in OPTIONS.items()
    if name != "wide-z" or "dropout" not in o  # x − drop(x) meets no magnitude
}
TINY = Dora(SMALL, FP32, grad_base=True)


def dora_norm() -> Iterator[Case]:
    for dtype, shape, base, name in itertools.product(
        DTYPES, SHAPES, BASES, ("plain", "fp32-adapters")
    ):
        call = Dora(shape, dtype, base=base, **OPTIONS[name])
        label = f"{dtype_name(dtype)}-{size_name(*shape[1:])}-{base}"
        label += f"-{name}" * (name != "plain")
        yield case_of("dora_norm", label, call)
    for dtype, base, name in itertools.product(DTYPES, BASES, ("zero-rows", "kept-nothing")):
        call = Dora(SMALL, dtype, base=base, **SPECIAL[name])
        label = f"{dtype_name(dtype)}-{size_name(*SMALL[1:])}-{base}-{name}"
        core = dtype is not FP16 and base in ("dense", "nf4-nested")
        yield case_of("dora_norm", label, call, core=core)


def _calls() -> Iterator[tuple[str, Dora, bool]]:
    for dtype, shape, (name, o) in itertools.product(DTYPES, SHAPES, OPTIONS.items()):
        call = Dora(shape, dtype, grad_base=True, **o)
        yield f"{dtype_name(dtype)}-{size_name(*shape)}-{name}", call, False
    for dtype, base, (name, o) in itertools.product(DTYPES, BASES, (OPTIONS | SPECIAL).items()):
        if base != "dense" and name.startswith("zero-rows") and dtype is not FP32:
            continue  # a 4-bit row of zeros is one like any other
        core = dtype is FP32 and base in ("dense", "nf4-nested") and name in ("plain", "all")
        label = f"{dtype_name(dtype)}-{size_name(*SMALL)}-{base}-{name}"
        yield label, Dora(SMALL, dtype, base=base, grad_base=True, **o), core
    for shape in SHAPES:
        label = f"bfloat16-{size_name(*shape)}-nf4-nested-all"
        yield label, Dora(shape, BF16, base="nf4-nested", **ALL), False
    for shape, base, (name, o) in itertools.product(WIDE_SHAPES, WIDE_BASES, WIDE.items()):
        label = f"float16-{size_name(*shape)}-{base}-{name}"
        yield label, Dora(shape, FP16, base=base, grad_base=True, **o), False


def dora_linear_fwd() -> Iterator[Case]:
    for label, call, core in _calls():
        yield case_of("dora_linear_fwd", label, call, core=core)


def dora_linear_bwd() -> Iterator[Case]:
    for label, call, core in _calls():
        yield case_of("dora_linear_bwd", label, call, core=core)
    for i, p in itertools.product(range(6), (0.0, 0.1)):  # one gradient at a time
        needs = tuple(j == i for j in range(6))
        call = replace(TINY, bias=True, dropout=p, needs=needs)
        yield case_of("dora_linear_bwd", f"needs-only-{i}-p{p}", call, core=True)
    call = replace(TINY, strides="expanded")
    yield case_of("dora_linear_bwd", "dy-expanded", call, core=True)
