"""Calls over 4-bit weights: rows that are no multiple of a block, odd rows, blocks that straddle
rows, nested scales; the products with every way of decoding, the codec to the last bit."""

from __future__ import annotations

from tests.compiled.problems import Problem, both
from tools.op_inputs.layer import Codec, Layer
from tools.op_inputs.source import BF16, FP16, FP32

LORA = (
    Problem(
        "decode",
        Layer((1, 72, 192, 8), base="nf4-nested", bias=True),
        both("16x32x128 w4 s4", "16x64x128 w4 s4"),
    ),
    Problem(
        "tma-nested",
        Layer((130, 136, 320, 16), base="nf4-nested", dropout=0.1),
        both("64x64x64 w4 s3", "128x128x64 w8 s4", tma=True),
    ),
    Problem(
        "tma-plain-scales",
        Layer((70, 200, 256, 24), base="nf4", adapter=FP32, bias=True),
        both("128x128x32 w8 s4", "64x128x64 w4 s4", tma=True),
    ),
    Problem(
        "straddling",  # 96 = 64 + 32: a block straddles two rows
        Layer((33, 65, 96, 12), base="nf4-nested", dtype=FP16, dropout=0.3),
        both("64x128x32 w4 s4", "64x64x64 w4 s3"),
    ),
    Problem(
        "odd-rows-fp4",
        Layer((7, 33, 41, 3), base="fp4-nested-b32"),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
    ),
    Problem(
        "fp32",
        Layer((17, 40, 100, 5), base=(128, True, "nf4"), dtype=FP32),
        both("32x32x32 w4 s2", "32x32x32 w4 s2"),
    ),
    Problem(
        "whole-tiles",
        Layer((128, 128, 256, 16), base="nf4-nested"),
        both("128x128x64 w8 s2", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)
CODEC = tuple(
    Problem(
        f"{n}x{k}-{str(dtype).removeprefix('torch.')}-{quant_type}-b{block}{'-nested' * nested}",
        Codec(n, k, dtype, (block, nested, quant_type)),
        exact=True,
    )
    for n, k, dtype, block, nested, quant_type in (
        (33, 130, BF16, 64, True, "nf4"),
        (64, 129, FP16, 32, False, "fp4"),
        (65, 128, FP32, 64, True, "nf4"),
        (7, 31, BF16, 4096, True, "fp4"),
        (130, 257, FP32, 256, False, "nf4"),
    )
)
