"""Calls of one layer for the compiled kernels: few, ragged, between them every path of the code.

`families.py` says how another family of ops joins, with makers for these problems or its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.strategies import STRATEGIES
from tools.op_inputs.source import Source, strided

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Problem:
    """One call; `tiles` by compute capability are forced on the products in it."""

    name: str
    shape: tuple[int, int, int, int]  # M, N, K, r
    tiles: dict[int, GemmConfig]
    dtype: torch.dtype = BF16
    adapter: torch.dtype = BF16
    dropout: float = 0.0
    bias: bool = False
    rank_diag: bool = False
    out_diag: bool = False
    strides: str = ""
    needs: tuple[bool, ...] | None = None
    slow: bool = False
    strategies: tuple[str | None, ...] = STRATEGIES
    multiprocessors: int | None = None  # fewer make longer loops


def tile(text: str, *, tma: bool = False) -> GemmConfig:
    """From, say, 128x64x32 w4 s3."""
    shape, warps, stages = text.split()
    m, n, k = map(int, shape.split("x"))
    return GemmConfig(m, n, k, int(warps[1:]), int(stages[1:]), tma=tma)


def both(sm_80: str, sm_90: str, tma: bool = False) -> dict[int, GemmConfig]:
    return {80: tile(sm_80), 90: tile(sm_90, tma=tma)}


# TMA needs rows of whole 16 bytes: there N and K are multiples of 8, and still of no tile.
PROBLEMS = (
    Problem("one-row", (1, 48, 40, 3), both("16x32x128 w4 s4", "16x64x128 w4 s4")),
    Problem(
        "odd-k-fp16",
        (7, 41, 41, 1),
        both("16x16x256 w4 s3", "64x32x32 w4 s2"),
        FP16,
        FP16,
        dropout=0.3,
    ),
    Problem(
        "everything",
        (33, 129, 97, 8),
        both("32x64x64 w4 s4", "64x64x64 w4 s3"),
        adapter=FP32,
        dropout=0.3,
        bias=True,
        rank_diag=True,
        out_diag=True,
    ),
    Problem(
        "tma-ragged",
        (130, 136, 200, 16),
        both("64x128x32 w4 s4", "64x64x64 w4 s4", tma=True),
        dropout=0.1,
    ),
    Problem(
        "tma-plain",
        (130, 264, 136, 24),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        adapter=FP32,
        bias=True,
    ),
    Problem(
        "fp32",
        (33, 100, 72, 12),
        both("32x32x32 w4 s2", "16x16x32 w2 s2"),
        FP32,
        FP32,
        dropout=0.3,
        rank_diag=True,
        out_diag=True,
    ),
    Problem("fp32-plain", (7, 41, 33, 3), both("16x16x32 w2 s2", "32x32x32 w4 s2"), FP32, FP32),
    Problem(
        "transposed-x",
        (130, 72, 104, 12),
        both("128x64x32 w4 s4", "128x64x32 w4 s4"),
        FP16,
        FP32,
        dropout=0.3,
        out_diag=True,
        strides="transposed",
    ),
    Problem(
        "padded-rows",
        (33, 65, 130, 64),
        both("64x64x64 w4 s3", "64x64x64 w4 s2"),
        strides="padded-rows",
        bias=True,
    ),
    Problem(
        "rank-200",
        (33, 136, 104, 200),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
        adapter=FP32,
        dropout=0.1,
        bias=True,
        rank_diag=True,
    ),
    Problem(
        "whole-tiles",
        (128, 128, 256, 16),
        both("128x128x64 w8 s2", "64x128x64 w4 s4", tma=True),
        dropout=0.1,
    ),
    Problem(
        "whole-tiles-plain",
        (64, 128, 384, 16),
        both("64x128x32 w4 s4", "64x128x64 w4 s4", tma=True),
    ),
    Problem(
        "whole-tiles-pointers",
        (64, 64, 256, 16),
        both("64x64x64 w4 s3", "64x64x64 w4 s3"),
        dropout=0.1,
    ),
    Problem(
        "many-steps",
        (576, 256, 200, 16),
        both("64x64x32 w4 s2", "64x64x64 w4 s4", tma=True),
        bias=True,
        multiprocessors=2,
    ),
    Problem(
        "many-steps-rank-64",
        (384, 256, 520, 64),
        both("64x64x64 w4 s3", "64x128x64 w4 s4", tma=True),
        adapter=FP32,
        dropout=0.1,
        bias=True,
        multiprocessors=2,
    ),
    Problem(
        "many-steps-diagonals",
        (392, 264, 392, 40),
        both("32x64x64 w4 s4", "64x64x64 w4 s3"),
        bias=True,
        rank_diag=True,
        out_diag=True,
        multiprocessors=2,
    ),
    Problem(
        "widest",
        (130, 264, 392, 16),
        both("128x256x32 w8 s3", "128x256x64 w8 s3", tma=True),
        slow=True,
    ),
    Problem(
        "tallest",
        (264, 136, 392, 16),
        both("256x128x32 w8 s3", "256x128x64 w8 s3", tma=True),
        dropout=0.1,
        slow=True,
    ),
)
SMALL = both("16x16x32 w2 s2", "16x16x32 w2 s2")
ONE_GRADIENT = tuple(
    Problem(
        f"needs-only-{i}",
        (7, 33, 41, 3),
        SMALL,
        adapter=FP32,
        dropout=0.3,
        bias=True,
        rank_diag=True,
        out_diag=True,
        needs=tuple(j == i for j in range(7)),
        # The paths differ by what is asked, not by the product.
        strategies=STRATEGIES[:2],
    )
    for i in (
        0,
        1,
        2,
        4,
        5,
    )  # alone, the bias's gradient is torch's sum and dW the vendor's product
)


def _forward(p: Problem, r: Source) -> tuple[Any, ...]:
    m, n, k, rank = p.shape
    x = r.normal(m, k, dtype=p.dtype)
    return (
        strided(x, p.strides) if p.strides else x,
        [r.normal(n, k, dtype=p.dtype, std=k**-0.5)],
        [n, k],
        r.normal(rank, k, dtype=p.adapter, std=k**-0.5),
        r.normal(n, rank, dtype=p.adapter, std=rank**-0.5),
        0.75,
        r.normal(n, dtype=p.dtype) if p.bias else None,
        p.dropout,
        torch.tensor([-1234567890123456789]) if p.dropout else None,
        r.normal(rank, dtype=p.adapter) if p.rank_diag else None,
        r.normal(n, dtype=p.adapter) if p.out_diag else None,
    )


def _backward(p: Problem, r: Source) -> tuple[Any, ...]:
    x, base, meta, a, b, scale, bias, dropout, seed, rank_diag, out_diag = _forward(p, r)
    dy = r.normal(x.shape[0], meta[0], dtype=p.dtype)
    dy = strided(dy, p.strides) if p.strides else dy
    s = r.normal(x.shape[0], a.shape[0], dtype=p.dtype)
    given = (bias is not None, rank_diag is not None, out_diag is not None, False)
    needs = list(p.needs or (True, True, True, *given))
    return dy, x, s, base, meta, a, b, scale, dropout, seed, rank_diag, out_diag, needs


MAKERS: dict[str, Callable[[Problem, Source], tuple[Any, ...]]] = {
    "lora_linear_fwd": _forward,
    "lora_linear_bwd": _backward,
}
