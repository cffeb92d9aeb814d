"""Inputs of the multi-adapter ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from tests.ops.case import Case, case_of, dtype_name
from tools.op_inputs.gather import Gather
from tools.op_inputs.source import BF16, DTYPES, FP16, FP32, RANGES

QKV = Gather(n=(64, 24, 9), missing=((1, 0), (2, 3), (2, 1)), ranks=(8, 17, 3, 33))
RANKS = (1, 3, 8, 12, 24, 48, 96, 200, 256)
CALLS = {
    "plain": Gather(),
    "base": Gather(base="dense", bias=True),
    "bias-alone": Gather(bias=True),
    "nf4": Gather(base="nf4-nested", bias=True, page_dtype=FP32, dropout=(0.3, 0.0, 0.9)),
    "dropout": Gather(dropout=(0.25, 0.0)),
    "qkv": Gather(
        base="dense", dropout=(0.5,), **{f: getattr(QKV, f) for f in ("n", "missing", "ranks")}
    ),
    "mixture": Gather(mixture=31, base="dense", dropout=(0.1,)),
    "qkv-mixture": Gather(mixture=9, n=QKV.n, missing=QKV.missing, ranks=QKV.ranks),
    "fp32-pages": Gather(page_dtype=FP32, base="dense"),
    "no-adapter": Gather(slots="none", base="dense", bias=True),
    "no-token": Gather(t=0, base="dense"),
    "no-entry": Gather(mixture=0, slots="empty"),
    "last-slot": Gather(slots="last", ranks=(5, 0, 18)),
    "few-slots": Gather(t=70, k=97, n=(130,), ranks=(40, 7, 17), base="dense", dropout=(0.2, 0.0)),
    "mixed-mixture": Gather(t=20, k=70, n=(67,), ranks=RANKS, mixture=90),
    "one-slot": Gather(t=33, slots="one", base="dense"),
    "ranks": Gather(t=40, k=130, n=(97,), ranks=RANKS, slots="sorted"),
    "mixed-ranks": Gather(t=70, k=97, n=(130,), ranks=RANKS[::-1], dropout=(0.1, 0.0)),
    "rank-0": Gather(ranks=(0, 0), base="dense"),
    "odd": Gather(k=33, n=(7,), ranks=(2, 5)),
    "narrow": Gather(k=1, n=(1,), ranks=(1, 2)),
    "wide": Gather(t=6, k=1100, n=(1030,), ranks=(16, 5, 20)),
    "no-input": Gather(k=0, base="dense", bias=True, dropout=(0.2,)),
    "no-input-nf4": Gather(k=0, base="nf4"),
    "no-output": Gather(n=(0,), base="dense", bias=True),
    "no-output-of-one": Gather(n=(0, 24, 9), missing=((1, 0),), base="nf4", dropout=(0.2,)),
    "transposed": Gather(strides="transposed", dropout=(0.2,)),
    "padded-rows": Gather(strides="padded-rows", base="dense"),
}
WIDE = {
    f"{name}-{kind}": replace(CALLS[kind], range=of, bias=False)
    for name, of in RANGES.items()
    for kind in ("base", "dropout", "mixture", "fp32-pages", "few-slots", "one-slot", "qkv")
}
CORE = ("base", "qkv", "mixture", "no-token")


def _cases(op: str, **more: bool) -> Iterator[Case]:
    calls = [*itertools.product(DTYPES, CALLS.items()), *((FP16, wide) for wide in WIDE.items())]
    for dtype, (name, call) in calls:
        label = "-".join((dtype_name(dtype), name, *(k for k, v in more.items() if v)))
        call = replace(call, dtype=dtype, padded=not call.base, **more)
        yield case_of(op, label, call, core=name in CORE and dtype is BF16)


def gather_lora_fwd() -> Iterator[Case]:
    yield from _cases("gather_lora_fwd")


def gather_lora_add() -> Iterator[Case]:
    for overwrite in (False, True):
        yield from _cases("gather_lora_add", overwrite=overwrite)


def gather_lora_bwd() -> Iterator[Case]:
    yield from _cases("gather_lora_bwd")
    for i in range(3 + 3 * 3):  # one gradient at a time
        c = Gather(n=QKV.n, dtype=FP32, bias=True, mixture=20, dropout=(0.1,), needs=(i,))
        yield case_of("gather_lora_bwd", f"needs-only-{i}", c)
