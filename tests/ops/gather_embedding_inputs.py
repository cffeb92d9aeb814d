"""Inputs of the multi-adapter ops of an embedding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from tests.ops.case import Case, case_of, dtype_name
from tests.ops.gather_inputs import RANKS
from tools.op_inputs.gather import Gather
from tools.op_inputs.source import BF16, DTYPES, FP16, FP32

RAGGED = (1, 7, 16, 17, 64)
CALLS = {
    "plain": Gather(),
    "base": Gather(base="dense"),
    "fp32-pages": Gather(page_dtype=FP32, base="dense"),
    "fp16-pages": Gather(t=21, page_dtype=FP16, ranks=RAGGED, base="dense"),
    "bf16-pages": Gather(page_dtype=BF16, slots="sorted", base="dense"),
    "no-adapter": Gather(slots="none", base="dense"),
    "no-token": Gather(t=0, base="dense"),
    "last-slot": Gather(slots="last", ranks=(5, 0, 18)),
    "repeated-ids": Gather(t=70, k=3, n=(130,), ranks=(40, 7, 17), base="dense"),
    "one-slot": Gather(t=33, slots="one"),
    "ranks": Gather(t=40, k=130, n=(97,), ranks=RANKS, slots="sorted", base="dense"),
    "ragged": Gather(t=37, k=29, n=(67,), ranks=RAGGED, base="dense"),
    "ragged-fp32-pages": Gather(t=37, k=5, ranks=RAGGED, slots="sorted", page_dtype=FP32),
    "wide": Gather(t=6, k=9, n=(1030,), ranks=(16, 5, 20), base="dense"),
    "no-width": Gather(n=(0,), base="dense"),
    "transposed": Gather(base="dense", strides="transposed"),
    "padded-rows": Gather(base="dense", strides="padded-rows"),
    "rank-0": Gather(ranks=(0, 0), base="dense"),
    "narrow": Gather(k=1, n=(1,), ranks=(1, 2)),
}
CORE = ("base", "plain", "no-token")


def _cases(op: str) -> Iterator[Case]:
    for dtype, (name, call) in itertools.product(DTYPES, CALLS.items()):
        core = name in CORE and dtype is BF16
        yield case_of(op, f"{dtype_name(dtype)}-{name}", replace(call, dtype=dtype), core=core)


def gather_lora_embed_fwd() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_fwd")


def gather_lora_embed_add() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_add")


def gather_lora_embed_bwd() -> Iterator[Case]:
    yield from _cases("gather_lora_embed_bwd")
    for i in range(3):  # one gradient at a time
        yield case_of("gather_lora_embed_bwd", f"needs-only-{i}", Gather(dtype=FP32, needs=(i,)))
