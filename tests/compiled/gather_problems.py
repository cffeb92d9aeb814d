"""Calls of the multi-adapter ops for the compiled kernels, each cut both ways."""

from __future__ import annotations

from dataclasses import replace

from lora_kernels.ops.gather.triton.plan import SCHEDULES
from tests.compiled.problems import Problem
from tests.ops.gather_inputs import QKV
from tools.op_inputs.gather import Gather
from tools.op_inputs.source import FP16, FP32, RANGES

OVER_BASE = (*SCHEDULES, "fused")
_QKV = {"n": QKV.n, "missing": QKV.missing, "ranks": QKV.ranks}
PROBLEMS = (
    Problem("whole", Gather(t=70, k=256, n=(256,), ranks=(16, 32, 16))),
    Problem("long", Gather(t=150, k=600, n=(328,), ranks=(16, 5), dropout=(0.2, 0.0))),
    Problem("ragged-fp16", Gather(t=13, k=41, n=(67,), ranks=(3, 16, 1, 40), dtype=FP16)),
    Problem("qkv", Gather(t=20, k=72, **_QKV, dropout=(0.5,))),
    Problem("mixture", Gather(t=9, k=70, n=(67,), ranks=(1, 24, 8), mixture=25, dropout=(0.1,))),
    Problem("fp32", Gather(t=11, k=40, n=(48,), ranks=(7, 20), dtype=FP32)),
    Problem("fp32-pages", Gather(t=18, k=136, n=(72,), ranks=(12, 33), page_dtype=FP32)),
    Problem("strided", Gather(t=18, k=40, n=(48,), ranks=(3, 17), strides="transposed")),
    Problem(
        "wide-s-fp16",
        Gather(t=20, k=72, n=(67,), ranks=(3, 40), dtype=FP16, range=RANGES["wide-s"]),
    ),
    Problem(
        "wide-ds-fp16",
        Gather(t=20, k=72, n=(67,), ranks=(3, 40), dtype=FP16, range=RANGES["wide-ds"]),
    ),
    Problem("nobody", Gather(t=5, k=40, n=(48,), slots="none")),
)
_OVER = {"k": 64, "n": (72,), "ranks": (4, 20)}
OVER = (
    Problem("dense-base", Gather(t=20, **_OVER, base="dense", bias=True), strategies=OVER_BASE),
    Problem("nf4-base", Gather(t=20, **_OVER, base="nf4-nested"), strategies=OVER_BASE),
)
# More chunks than programs: each walks several.
SCATTERED = (
    Problem("scattered", Gather(t=300, k=32, n=(32,), ranks=(2,) * 280), strategies=("grouped",)),
)
# Where the base's product adds the adapters itself.
FUSED = (
    Problem("rows", Gather(t=33, k=600, n=(136,), ranks=(16, 3, 0), base="nf4", dropout=(0.2,))),
    Problem("wide", Gather(t=70, k=96, n=(130,), ranks=(40, 7), base="dense", bias=True)),
    Problem("odd", Gather(t=5, k=41, n=(67,), ranks=(1, 17), base="nf4", dtype=FP16)),
    Problem("fp32", Gather(t=9, k=40, n=(48,), ranks=(7, 20), base="dense", dtype=FP32)),
)
FUSED = tuple(replace(p, name=f"over-{p.name}", strategies=("fused",)) for p in FUSED)
# On an embedding: k is the vocabulary.
EMBEDDING = (
    Problem("tokens", Gather(t=37, k=29, n=(67,), ranks=(3, 16, 40), base="dense", dtype=FP16)),
    Problem("runs", Gather(t=90, k=3, n=(136,), ranks=(16, 5), page_dtype=FP32)),
)

OVERWRITE = ("whole", "nobody", "qkv")
ADDS = tuple(
    replace(p, call=replace(p.call, padded=True, overwrite=p.name in OVERWRITE)) for p in PROBLEMS
)
