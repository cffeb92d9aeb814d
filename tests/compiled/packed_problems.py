"""Calls of packed projections: one to four of them, of unequal widths and ranks, over dense and
4-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.strategies import STRATEGIES
from lora_kernels.ops.packed.schema import META
from tests.compiled.problems import BF16, FP16, FP32, SMALL, both
from tools.op_inputs.source import Source, strided


@dataclass(frozen=True)
class Packed:
    """One call: M, K and each projection's N, rank and bias; every gradient unless `needs` says."""

    name: str
    m: int
    k: int
    n: tuple[int, ...]
    r: tuple[int, ...]
    tiles: dict[int, GemmConfig]
    bias: tuple[bool, ...] = ()
    dtype: torch.dtype = BF16
    adapter: torch.dtype = BF16
    dropout: float = 0.0
    strides: str = ""
    bases: tuple[str, ...] = ()  # kinds of `tests.ops.case.BASES`; dense where not given
    needs: tuple[int, ...] | None = None  # positions in `needs`
    slow: bool = False
    strategies: tuple[str | None, ...] = STRATEGIES[:2]  # no vendor product to add to
    multiprocessors: int | None = None  # fewer make longer loops


# TMA needs rows of whole 16 bytes: there K and each N are multiples of 8, and still of no tile.
PROBLEMS = (
    Packed(
        "three",
        *(70, 136, (136, 72, 40), (16, 8, 3)),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
        bias=(True, False, True),
        dropout=0.1,
    ),
    Packed(
        "one",
        *(7, 41, (41,), (3,)),
        both("16x32x128 w4 s4", "16x32x128 w4 s4"),
        dtype=FP16,
        adapter=FP16,
        dropout=0.3,
    ),
    Packed(
        "two",
        *(33, 97, (65, 130), (8, 24)),
        both("32x64x64 w4 s4", "32x64x64 w4 s4"),
        bias=(True, True),
        adapter=FP32,
        dropout=0.3,
        strides="padded-rows",
    ),
    Packed(
        "four",
        *(33, 72, (40, 24, 72, 16), (3, 16, 5, 8)),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
        bias=(False, False, False, True),
        dropout=0.1,
    ),
    Packed(
        "fp32",
        *(17, 72, (40, 24, 8), (12, 1, 5)),
        both("16x16x32 w2 s2", "32x32x32 w4 s2"),
        dtype=FP32,
        adapter=FP32,
    ),
    Packed(
        "transposed",
        *(66, 104, (72, 40), (12, 5)),
        both("64x32x32 w4 s2", "64x32x32 w4 s2"),
        dtype=FP16,
        adapter=FP32,
        strides="transposed",
    ),
    Packed(
        "ranks-200-and-16",
        *(33, 104, (72, 40), (200, 16)),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
        adapter=FP32,
        dropout=0.1,
        strategies=("epilogue",),
    ),
    Packed(
        "whole-tiles",
        *(128, 128, (128, 64, 64), (16, 16, 16)),
        both("128x128x32 w8 s4", "128x64x64 w8 s4", tma=True),
    ),
    Packed(
        "many-steps",
        *(384, 200, (256, 128), (64, 16)),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
        bias=(True, True),
        multiprocessors=2,
    ),
    Packed(
        "widest",
        *(130, 392, (264, 136, 72), (16, 64, 8)),
        both("128x256x32 w8 s3", "128x256x64 w8 s3", tma=True),
        bias=(True, False, False),
        slow=True,
    ),
    Packed(
        "tallest",
        *(264, 200, (136, 264), (16, 3)),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        dropout=0.1,
        slow=True,
    ),
)
# Nested and plain scales, K of whole chunks, of half ones (a block straddles rows) and odd.
QUANTISED = (
    Packed(
        "nf4-nested",
        *(66, 192, (72, 40, 24), (16, 8, 3)),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
        bias=(True, False, True),
        dropout=0.1,
        bases=("nf4-nested",) * 3,
    ),
    Packed(
        "nf4-straddling",
        *(33, 96, (65, 40), (8, 24)),
        both("64x128x32 w4 s4", "64x64x64 w4 s3"),
        adapter=FP32,
        bases=("nf4",) * 2,
    ),
    Packed(
        "fp4-odd-rows",
        *(7, 41, (33, 24, 8), (3, 5, 16)),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
        dtype=FP16,
        adapter=FP16,
        dropout=0.3,
        bases=("fp4-nested-b32",) * 3,
    ),
    Packed(
        "nf4-decode",
        *(1, 128, (72, 16, 16), (8, 8, 8)),
        both("16x32x128 w4 s4", "16x64x128 w4 s4"),
        bases=("nf4-nested",) * 3,
    ),
    Packed(
        "nf4-mixed",
        *(17, 64, (40, 24, 32), (8, 3, 5)),
        both("16x32x128 w4 s4", "16x32x128 w4 s4"),
        bias=(False, True, False),
        bases=("nf4-nested", "dense", "nf4-nested"),
    ),
    Packed(
        "nf4-whole-tiles",
        *(128, 128, (128, 64, 64), (16, 16, 16)),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        bases=("nf4-nested",) * 3,
        slow=True,
    ),
)
# x, then a, b, bias and base of each of the three: one at a time, and some left out.
NEEDS = tuple(
    Packed(
        f"needs-{'-'.join(map(str, needs))}",
        *(7, 41, (33, 24, 8), (3, 16, 5)),
        SMALL,
        bias=(True, True, True),
        adapter=FP32,
        dropout=0.3,
        needs=needs,
    )
    for needs in ((0,), (2,), (5,), (4, 7), (0, 1, 3, 5, 6, 7, 9, 11))
)


def _forward(p: Packed, r: Source) -> tuple[Any, ...]:
    x = r.normal(p.m, p.k, dtype=p.dtype)
    count = len(p.n)
    bias = p.bias or (False,) * count
    kinds = p.bases or ("dense",) * count
    parts = [r.base(kind, n, p.k, p.dtype) for kind, n in zip(kinds, p.n, strict=True)]
    return (
        strided(x, p.strides) if p.strides else x,
        [t for base, _ in parts for t in base],
        [size for _, meta in parts for size in (*meta, *[0] * (META - len(meta)))],
        [r.normal(rank, p.k, dtype=p.adapter, std=p.k**-0.5) for rank in p.r],
        [
            r.normal(n, rank, dtype=p.adapter, std=rank**-0.5)
            for n, rank in zip(p.n, p.r, strict=True)
        ],
        [0.75, 2.0, -0.5, 1.25][:count],
        [r.normal(n, dtype=p.dtype) if has else None for n, has in zip(p.n, bias, strict=True)],
        p.dropout,
        torch.tensor([-1234567890123456789]) if p.dropout else None,
    )


def _backward(p: Packed, r: Source) -> tuple[Any, ...]:
    x, base, meta, a, b, scales, bias, *dropout = _forward(p, r)
    dy: list[Tensor] = [r.normal(p.m, n, dtype=p.dtype) for n in p.n]
    if p.strides:
        dy = [strided(t, p.strides) for t in dy]
    s = r.normal(p.m, sum(p.r), dtype=p.dtype)
    count = len(p.n)
    needs = [True] * (1 + 2 * count) + [t is not None for t in bias] + [False] * count
    if p.needs is not None:
        needs = [i in p.needs for i in range(len(needs))]
    return dy, x, s, base, meta, a, b, scales, *dropout, needs


MAKERS: dict[str, Callable[[Packed, Source], tuple[Any, ...]]] = {
    "lora_packed_fwd": _forward,
    "lora_packed_bwd": _backward,
}
