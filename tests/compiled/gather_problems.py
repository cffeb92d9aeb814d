"""Calls of the multi-adapter ops for the compiled kernels, each cut both ways.

The makers are those of `tests/ops/gather_inputs.py`: what an op must not read is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.gather.triton.plan import WAYS
from tests.compiled.problems import BF16, FP16, FP32
from tests.ops import gather_embedding_inputs as embedding
from tests.ops.gather_inputs import QKV, Gather, _add, _backward, _forward
from tools.op_inputs.source import Source

OVER_BASE = (*WAYS, "fused")


@dataclass(frozen=True)
class Many:
    """One call and its tokens' dtype."""

    name: str
    call: Gather
    dtype: torch.dtype = BF16
    slow: bool = False
    tiles: dict[int, GemmConfig] = field(default_factory=dict)
    strategies: tuple[str | None, ...] = WAYS


_QKV = {"n": QKV.n, "missing": QKV.missing, "ranks": QKV.ranks}
PROBLEMS = (
    Many("whole", Gather(t=70, k=256, n=(256,), ranks=(16, 32, 16))),
    Many("long", Gather(t=150, k=600, n=(328,), ranks=(16, 5), dropout=(0.2, 0.0))),
    Many("ragged-fp16", Gather(t=13, k=41, n=(67,), ranks=(3, 16, 1, 40)), FP16),
    Many("qkv", Gather(t=20, k=72, **_QKV, dropout=(0.5,))),
    Many("mixture", Gather(t=9, k=70, n=(67,), ranks=(1, 24, 8), mixture=25, dropout=(0.1,))),
    Many("fp32", Gather(t=11, k=40, n=(48,), ranks=(7, 20)), FP32),
    Many("fp32-pages", Gather(t=18, k=136, n=(72,), ranks=(12, 33), page_dtype=FP32)),
    Many("strided", Gather(t=18, k=40, n=(48,), ranks=(3, 17), strides="transposed")),
    Many("nobody", Gather(t=5, k=40, n=(48,), slots="none")),
)
_OVER = {"k": 64, "n": (72,), "ranks": (4, 20)}
OVER = (
    Many("dense-base", Gather(t=20, **_OVER, base="dense", bias=True), strategies=OVER_BASE),
    Many("nf4-base", Gather(t=20, **_OVER, base="nf4-nested"), strategies=OVER_BASE),
)
# More chunks than programs: each walks several.
SCATTERED = (
    Many("scattered", Gather(t=300, k=32, n=(32,), ranks=(2,) * 280), strategies=("chunks",)),
)
# Where the base's product adds the adapters itself.
FUSED = (
    Many("rows", Gather(t=33, k=600, n=(136,), ranks=(16, 3, 0), base="nf4", dropout=(0.2,))),
    Many("wide", Gather(t=70, k=96, n=(130,), ranks=(40, 7), base="dense", bias=True)),
    Many("odd", Gather(t=5, k=41, n=(67,), ranks=(1, 17), base="nf4"), FP16),
    Many("fp32", Gather(t=9, k=40, n=(48,), ranks=(7, 20), base="dense"), FP32),
)
FUSED = tuple(replace(p, name=f"over-{p.name}", strategies=("fused",)) for p in FUSED)


OVERWRITE = ("whole", "nobody", "qkv")
Makers = dict[str, Callable[[Many, Source], tuple[Any, ...]]]
FORWARD: Makers = {"gather_lora_fwd": lambda p, r: _forward(p.call, p.dtype, r)}
BOTH_WAYS: Makers = {
    **FORWARD,
    "gather_lora_bwd": lambda p, r: _backward(p.call, p.dtype, r),
}
ADDS: Makers = {"gather_lora_add": lambda p, r: _add(p.call, p.dtype, r, p.name in OVERWRITE)}

# On an embedding: k is the vocabulary.
EMBEDDING = (
    Many("tokens", Gather(t=37, k=29, n=(67,), ranks=(3, 16, 40), base="dense"), FP16),
    Many("runs", Gather(t=90, k=3, n=(136,), ranks=(16, 5), page_dtype=FP32)),
)
EMBED: Makers = {
    "gather_lora_embed_fwd": lambda p, r: embedding._forward(p.call, p.dtype, r),
    "gather_lora_embed_bwd": lambda p, r: embedding._backward(p.call, p.dtype, r),
}
EMBED_ADD: Makers = {
    "gather_lora_embed_add": lambda p, r: embedding._add(p.call, p.dtype, r),
}
