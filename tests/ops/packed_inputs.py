"""Inputs of the packed LoRA ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.ops.case import Case, case_of, dtype_name
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import DTYPES, FP16, FP32, RANGES

NF4 = ("nf4",) * 3
MIXED = ("nf4-nested", "dense", "fp4-nested-b32")
NESTED = ("nf4-nested",) * 3
BIAS = (True, False, True)
CALLS = {
    "plain": Packed(),
    "bias": Packed(bias=BIAS),
    "dropout": Packed(bias=BIAS, dropout=0.3),
    "fp32-adapters": Packed(bias=BIAS, adapter=FP32),
    "nf4": Packed(bias=BIAS, bases=NF4, dropout=0.25, adapter=FP32),
    "nested": Packed(bias=BIAS, bases=NESTED, adapter=FP32),
    "mixed": Packed(bias=BIAS, bases=MIXED, dropout=0.5, adapter=FP32),
    "transposed": Packed(bias=BIAS, strides="transposed", dropout=0.3),
    "padded-rows": Packed(bias=BIAS, strides="padded-rows", bases=NF4),
    "one": Packed(n=(33,), r=(3,), bases=("nf4-nested",), bias=(True,), dropout=0.3),
}
for _m, _k in itertools.product((0, 1, 7, 33), (31, 97)):
    _shape = {"m": _m, "k": _k}
    CALLS[f"pair-{_m}x{_k}"] = Packed(
        n=(65, 65), r=(8, 5), bases=("dense",) * 2, bias=(False,) * 2, dropout=0.1, **_shape
    )
    CALLS[f"mixed-{_m}x{_k}"] = Packed(
        n=(40, 7, 130), bases=MIXED, bias=BIAS, dropout=0.3, adapter=FP32, **_shape
    )
_pair: dict[str, Any] = {"r": (8, 5), "bases": ("dense", "nf4"), "bias": (True, False)}
CALLS["no-input"] = Packed(k=0, n=(9, 16), dropout=0.1, **_pair)
CALLS["no-output"] = Packed(n=(0, 16), dropout=0.1, **_pair)
CALLS["no-nf4-output"] = Packed(n=(16, 0), **_pair)
WIDE = {
    f"{name}-{kind}": Packed(m=33, k=97, dtype=FP16, grad_base=True, range=of, **options)
    for name, of in RANGES.items()
    for kind, options in {
        "plain": {},
        "dropout": {"dropout": 0.3},
        "mixed": {"bases": MIXED, "dropout": 0.3, "adapter": FP32},
    }.items()
}
CORE = ("bias", "mixed", "one", "transposed", "mixed-0x31")


def _cases(op: str) -> Iterator[Case]:
    for dtype, (name, call) in itertools.product(DTYPES, CALLS.items()):
        call = replace(call, dtype=dtype, grad_base=True)
        core = name in CORE and dtype is not FP16
        yield case_of(op, f"{dtype_name(dtype)}-{name}", call, core=core)
    for name, call in WIDE.items():
        yield case_of(op, f"float16-{name}", call)


def lora_packed_fwd() -> Iterator[Case]:
    yield from _cases("lora_packed_fwd")


def lora_packed_bwd() -> Iterator[Case]:
    yield from _cases("lora_packed_bwd")
    for i in range(1 + 4 * 3):  # one gradient at a time
        call = Packed(dtype=FP32, bias=BIAS, dropout=0.1, needs=(i,))
        yield case_of("lora_packed_bwd", f"needs-only-{i}", call, core=i in (0, 2, 12))
