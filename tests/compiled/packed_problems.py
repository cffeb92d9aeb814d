"""Calls of packed projections: one to four of them, of unequal widths and ranks, over dense and
4-bit weights."""

from __future__ import annotations

from tests.compiled.problems import SMALL, Problem, both
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import FP16, FP32, RANGES

# TMA needs rows of whole 16 bytes: there K and each N are multiples of 8, and still of no tile.
PROBLEMS = (
    Problem(
        "three",
        Packed(m=70, k=136, n=(136, 72, 40), r=(16, 8, 3), bias=(True, False, True), dropout=0.1),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "one",
        Packed(m=7, k=41, n=(41,), r=(3,), dtype=FP16, dropout=0.3),
        both("16x32x128 w4 s4", "16x32x128 w4 s4"),
    ),
    Problem(
        "two",
        Packed(
            m=33,
            k=97,
            n=(65, 130),
            r=(8, 24),
            bias=(True, True),
            adapter=FP32,
            dropout=0.3,
            strides="padded-rows",
        ),
        both("32x64x64 w4 s4", "32x64x64 w4 s4"),
    ),
    Problem(
        "four",
        Packed(
            m=33,
            k=72,
            n=(40, 24, 72, 16),
            r=(3, 16, 5, 8),
            bias=(False, False, False, True),
            dropout=0.1,
        ),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "fp32",
        Packed(m=17, k=72, n=(40, 24, 8), r=(12, 1, 5), dtype=FP32),
        both("16x16x32 w2 s2", "32x32x32 w4 s2"),
    ),
    Problem(
        "transposed",
        Packed(m=66, k=104, n=(72, 40), r=(12, 5), dtype=FP16, adapter=FP32, strides="transposed"),
        both("64x32x32 w4 s2", "64x32x32 w4 s2"),
    ),
    Problem(
        "wide-s-fp16",
        Packed(
            m=70,
            k=136,
            n=(72, 40),
            r=(16, 3),
            dtype=FP16,
            dropout=0.1,
            range=RANGES["wide-s"],
        ),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "wide-ds-fp16",
        Packed(
            m=66,
            k=104,
            n=(72, 40),
            r=(64, 5),
            dtype=FP16,
            adapter=FP32,
            range=RANGES["wide-ds"],
        ),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "ranks-200-and-16",
        Packed(m=33, k=104, n=(72, 40), r=(200, 16), adapter=FP32, dropout=0.1),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
        strategies=("epilogue",),
    ),
    Problem(
        "whole-tiles",
        Packed(m=128, k=128, n=(128, 64, 64), r=(16, 16, 16)),
        both("128x128x32 w8 s4", "128x64x64 w8 s4", tma=True),
    ),
    Problem(
        "many-steps",
        Packed(m=384, k=200, n=(256, 128), r=(64, 16), bias=(True, True)),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
        multiprocessors=2,
    ),
    Problem(
        "widest",
        Packed(m=130, k=392, n=(264, 136, 72), r=(16, 64, 8), bias=(True, False, False)),
        both("128x256x32 w8 s3", "128x256x64 w8 s3", tma=True),
        slow=True,
    ),
    Problem(
        "tallest",
        Packed(m=264, k=200, n=(136, 264), r=(16, 3), dropout=0.1),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)
# Nested and plain scales, K of whole chunks, of half ones (a block straddles rows) and odd.
QUANTISED = (
    Problem(
        "nf4-nested",
        Packed(
            m=66,
            k=192,
            n=(72, 40, 24),
            r=(16, 8, 3),
            bias=(True, False, True),
            dropout=0.1,
            bases=("nf4-nested",) * 3,
        ),
        both("64x64x32 w4 s4", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "nf4-straddling",
        Packed(m=33, k=96, n=(65, 40), r=(8, 24), adapter=FP32, bases=("nf4",) * 2),
        both("64x128x32 w4 s4", "64x64x64 w4 s3"),
    ),
    Problem(
        "fp4-odd-rows",
        Packed(
            m=7,
            k=41,
            n=(33, 24, 8),
            r=(3, 5, 16),
            dtype=FP16,
            dropout=0.3,
            bases=("fp4-nested-b32",) * 3,
        ),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
    ),
    Problem(
        "nf4-decode",
        Packed(m=1, k=128, n=(72, 16, 16), r=(8, 8, 8), bases=("nf4-nested",) * 3),
        both("16x32x128 w4 s4", "16x64x128 w4 s4"),
    ),
    Problem(
        "nf4-mixed",
        Packed(
            m=17,
            k=64,
            n=(40, 24, 32),
            r=(8, 3, 5),
            bias=(False, True, False),
            bases=("nf4-nested", "dense", "nf4-nested"),
        ),
        both("16x32x128 w4 s4", "16x32x128 w4 s4"),
    ),
    Problem(
        "nf4-whole-tiles",
        Packed(m=128, k=128, n=(128, 64, 64), r=(16, 16, 16), bases=("nf4-nested",) * 3),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)
# x, then a, b, bias and base of each of the three: one at a time, and some left out.
NEEDS = tuple(
    Problem(
        f"needs-{'-'.join(map(str, needs))}",
        Packed(
            m=7,
            k=41,
            n=(33, 24, 8),
            r=(3, 16, 5),
            bias=(True, True, True),
            adapter=FP32,
            dropout=0.3,
            needs=needs,
        ),
        SMALL,
    )
    for needs in ((0,), (2,), (5,), (4, 7), (0, 1, 3, 5, 6, 7, 9, 11))
)
