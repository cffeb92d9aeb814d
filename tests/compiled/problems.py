"""Calls of one layer for the compiled kernels: few, ragged, between them every path of the code.

`families.py` says how another family of ops joins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.strategies import STRATEGIES
from tools.op_inputs.layer import Layer
from tools.op_inputs.source import FP16, FP32, RANGES


@dataclass(frozen=True)
class Problem:
    """One call.

    Attributes:
        call: what `tools.op_inputs.arguments` takes.
        tiles: by compute capability, forced on the products in it.
        strategies: orders of the products, or ways to cut them; the family's own where not given.
        multiprocessors: fewer make longer loops.
        exact: the result has the reference's bits.
    """

    name: str
    call: Any
    tiles: dict[int, GemmConfig] = field(default_factory=dict)
    slow: bool = False
    strategies: tuple[str | None, ...] = ()
    multiprocessors: int | None = None
    exact: bool = False


def tile(text: str, *, tma: bool = False) -> GemmConfig:
    """From, say, 128x64x32 w4 s3."""
    shape, warps, stages = text.split()
    m, n, k = map(int, shape.split("x"))
    return GemmConfig(m, n, k, int(warps[1:]), int(stages[1:]), tma=tma)


def both(sm_80: str, sm_90: str, tma: bool = False) -> dict[int, GemmConfig]:
    return {80: tile(sm_80), 90: tile(sm_90, tma=tma)}


# TMA needs rows of whole 16 bytes: there N and K are multiples of 8, and still of no tile.
PROBLEMS = (
    Problem("one-row", Layer((1, 48, 40, 3)), both("16x32x128 w4 s4", "16x64x128 w4 s4")),
    Problem(
        "odd-k-fp16",
        Layer((7, 41, 41, 1), dtype=FP16, dropout=0.3),
        both("16x16x256 w4 s3", "64x32x32 w4 s2"),
    ),
    Problem(
        "everything",
        Layer(
            (33, 129, 97, 8), adapter=FP32, dropout=0.3, bias=True, rank_diag=True, out_diag=True
        ),
        both("32x64x64 w4 s4", "64x64x64 w4 s3"),
    ),
    Problem(
        "tma-ragged",
        Layer((130, 136, 200, 16), dropout=0.1),
        both("64x128x32 w4 s4", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "tma-plain",
        Layer((130, 264, 136, 24), adapter=FP32, bias=True),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
    ),
    Problem(
        "fp32",
        Layer((33, 100, 72, 12), dtype=FP32, dropout=0.3, rank_diag=True, out_diag=True),
        both("32x32x32 w4 s2", "16x16x32 w2 s2"),
    ),
    Problem(
        "fp32-plain", Layer((7, 41, 33, 3), dtype=FP32), both("16x16x32 w2 s2", "32x32x32 w4 s2")
    ),
    Problem(
        "transposed-x",
        Layer(
            (130, 72, 104, 12),
            dtype=FP16,
            adapter=FP32,
            dropout=0.3,
            out_diag=True,
            strides="transposed",
        ),
        both("128x64x32 w4 s4", "128x64x32 w4 s4"),
    ),
    Problem(
        "wide-s-fp16",
        Layer((70, 136, 200, 16), FP16, dropout=0.1, range=RANGES["wide-s"]),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "wide-ds-fp16",
        Layer((130, 72, 104, 64), FP16, adapter=FP32, range=RANGES["wide-ds"]),
        both("128x64x32 w4 s4", "128x64x32 w4 s4"),
    ),
    Problem(
        "padded-rows",
        Layer((33, 65, 130, 64), strides="padded-rows", bias=True),
        both("64x64x64 w4 s3", "64x64x64 w4 s2"),
    ),
    Problem(
        "rank-200",
        Layer((33, 136, 104, 200), adapter=FP32, dropout=0.1, bias=True, rank_diag=True),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "whole-tiles",
        Layer((128, 128, 256, 16), dropout=0.1),
        both("128x128x64 w8 s2", "64x128x64 w4 s4", tma=True),
    ),
    Problem(
        "whole-tiles-plain",
        Layer((64, 128, 384, 16)),
        both("64x128x32 w4 s4", "64x128x64 w4 s4", tma=True),
    ),
    Problem(
        "whole-tiles-pointers",
        Layer((64, 64, 256, 16), dropout=0.1),
        both("64x64x64 w4 s3", "64x64x64 w4 s3"),
    ),
    Problem(
        "many-steps",
        Layer((576, 256, 200, 16), bias=True),
        both("64x64x32 w4 s2", "64x64x64 w4 s4", tma=True),
        multiprocessors=2,
    ),
    Problem(
        "many-steps-rank-64",
        Layer((384, 256, 520, 64), adapter=FP32, dropout=0.1, bias=True),
        both("64x64x64 w4 s3", "64x128x64 w4 s4", tma=True),
        multiprocessors=2,
    ),
    Problem(
        "many-steps-diagonals",
        Layer((392, 264, 392, 40), bias=True, rank_diag=True, out_diag=True),
        both("32x64x64 w4 s4", "64x64x64 w4 s3"),
        multiprocessors=2,
    ),
    Problem(
        "widest",
        Layer((130, 264, 392, 16)),
        both("128x256x32 w8 s3", "128x256x64 w8 s3", tma=True),
        slow=True,
    ),
    Problem(
        "tallest",
        Layer((264, 136, 392, 16), dropout=0.1),
        both("256x128x32 w8 s3", "256x128x64 w8 s3", tma=True),
        slow=True,
    ),
)
SMALL = both("16x16x32 w2 s2", "16x16x32 w2 s2")
ONE_GRADIENT = tuple(
    Problem(
        f"needs-only-{i}",
        Layer(
            (7, 33, 41, 3),
            adapter=FP32,
            dropout=0.3,
            bias=True,
            rank_diag=True,
            out_diag=True,
            needs=tuple(j == i for j in range(7)),
        ),
        SMALL,
        strategies=STRATEGIES[:2],  # the paths differ by what is asked, not by the product
    )
    # Alone, the bias's gradient is torch's sum and dW the vendor's product.
    for i in (0, 1, 2, 4, 5)
)
