"""Calls over 4-bit weights: rows that are no multiple of a block, odd rows, blocks that straddle
rows, nested scales; the products with every way of decoding, the codec to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_kernels import NF4Weight, use_backend
from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.strategies import STRATEGIES
from tests.compiled.problems import BF16, FP16, FP32, both
from tools.op_inputs.source import Source


@dataclass(frozen=True)
class Quantised:
    """One call over a 4-bit W [N, K]."""

    name: str
    shape: tuple[int, int, int, int]  # M, N, K, r
    tiles: dict[int, GemmConfig] = field(default_factory=dict)
    dtype: torch.dtype = BF16
    block: int = 64
    nested: bool = True
    quant_type: str = "nf4"
    dropout: float = 0.0
    bias: bool = False
    adapter: torch.dtype = BF16
    slow: bool = False
    exact: bool = False
    strategies: tuple[str | None, ...] = STRATEGIES

    def base(self, r: Source) -> tuple[list[torch.Tensor], list[int]]:
        n, k = self.shape[1:3]
        with use_backend("reference"):
            w = r.normal(n, k, dtype=self.dtype, std=k**-0.5)
            q = NF4Weight.quantize(w, self.block, self.nested, self.quant_type)
        return q.base, q.meta


LORA = (
    Quantised("decode", (1, 72, 192, 8), both("16x32x128 w4 s4", "16x64x128 w4 s4"), bias=True),
    Quantised(
        "tma-nested",
        (130, 136, 320, 16),
        both("64x64x64 w4 s3", "128x128x64 w8 s4", tma=True),
        dropout=0.1,
    ),
    Quantised(
        "tma-plain-scales",
        (70, 200, 256, 24),
        both("128x128x32 w8 s4", "64x128x64 w4 s4", tma=True),
        nested=False,
        adapter=FP32,
        bias=True,
    ),
    Quantised(  # 96 = 64 + 32: a block straddles two rows
        "straddling",
        (33, 65, 96, 12),
        both("64x128x32 w4 s4", "64x64x64 w4 s3"),
        FP16,
        dropout=0.3,
        adapter=FP16,
    ),
    Quantised(
        "odd-rows-fp4",
        (7, 33, 41, 3),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
        block=32,
        quant_type="fp4",
    ),
    Quantised(
        "fp32",
        (17, 40, 100, 5),
        both("32x32x32 w4 s2", "32x32x32 w4 s2"),
        FP32,
        128,
        adapter=FP32,
    ),
    Quantised(
        "whole-tiles",
        (128, 128, 256, 16),
        both("128x128x64 w8 s2", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)
# Without a branch there is no pass that makes it.
BASE = tuple(replace(p, strategies=("epilogue", "addmm")) for p in LORA)
CODEC = tuple(
    Quantised(
        f"{n}x{k}-{str(dtype).removeprefix('torch.')}-{quant_type}-b{block}{'-nested' * nested}",
        (0, n, k, 0),
        dtype=dtype,
        block=block,
        nested=nested,
        quant_type=quant_type,
        exact=True,
        strategies=(None,),
    )
    for n, k, dtype, block, nested, quant_type in (
        (33, 130, BF16, 64, True, "nf4"),
        (64, 129, FP16, 32, False, "fp4"),
        (65, 128, FP32, 64, True, "nf4"),
        (7, 31, BF16, 4096, True, "fp4"),
        (130, 257, FP32, 256, False, "nf4"),
    )
)


def _linear_forward(p: Quantised, r: Source) -> tuple[Any, ...]:
    m, n, k, _ = p.shape
    x = r.normal(m, k, dtype=p.dtype)
    return x, *p.base(r), r.normal(n, dtype=p.dtype) if p.bias else None


def _linear_backward(p: Quantised, r: Source) -> tuple[Any, ...]:
    return r.normal(p.shape[0], p.shape[1], dtype=p.dtype), *p.base(r)


def _lora_forward(p: Quantised, r: Source) -> tuple[Any, ...]:
    m, n, k, rank = p.shape
    x = r.normal(m, k, dtype=p.dtype)
    base, meta = p.base(r)
    a = r.normal(rank, k, dtype=p.adapter, std=k**-0.5)
    b = r.normal(n, rank, dtype=p.adapter, std=rank**-0.5)
    bias = r.normal(n, dtype=p.dtype) if p.bias else None
    seed = torch.tensor([77]) if p.dropout else None
    return x, base, meta, a, b, 0.75, bias, p.dropout, seed, None, None


def _lora_backward(p: Quantised, r: Source) -> tuple[Any, ...]:
    x, base, meta, a, b, scale, _, dropout, seed, *_ = _lora_forward(p, r)
    dy = r.normal(p.shape[0], p.shape[1], dtype=p.dtype)
    s = r.normal(p.shape[0], p.shape[3], dtype=p.dtype)
    needs = [True, True, True, False, False, False, False]
    return dy, x, s, base, meta, a, b, scale, dropout, seed, None, None, needs


def _dequantize(p: Quantised, r: Source) -> tuple[Any, ...]:
    return *p.base(r), p.dtype


def _quantize(p: Quantised, r: Source) -> tuple[Any, ...]:
    w = r.normal(*p.shape[1:3], dtype=p.dtype)
    return w, p.block, int(p.quant_type == "fp4")


def _quantize_scales(p: Quantised, r: Source) -> tuple[Any, ...]:
    absmax = r.normal(p.shape[1] * p.shape[2]).abs()
    map_ = torch.sort(r.normal(256)).values
    return absmax, map_ / map_.abs().max(), absmax.mean().reshape(1), p.block


Makers = dict[str, Callable[[Quantised, Source], tuple[Any, ...]]]
LORA_MAKERS: Makers = {"lora_linear_fwd": _lora_forward, "lora_linear_bwd": _lora_backward}
BASE_MAKERS: Makers = {"nf4_linear_fwd": _linear_forward, "nf4_linear_bwd": _linear_backward}
CODEC_MAKERS: Makers = {
    "nf4_dequantize": _dequantize,
    "nf4_quantize": _quantize,
    "nf4_quantize_scales": _quantize_scales,
}
