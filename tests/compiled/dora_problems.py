"""Calls of the DoRA kernels: those of one layer, and over 4-bit weights. DoRA has no diagonals: one
over the ranks stands for rows that are special, without one over the outputs for a magnitude that
does not learn."""

from __future__ import annotations

from dataclasses import replace

from tests.compiled import problems
from tests.compiled.problems import Problem, both
from tools.op_inputs.dora import Dora
from tools.op_inputs.layer import Layer
from tools.op_inputs.source import FP16, FP32

# Nested and plain scales, K of whole chunks, of half ones (a block straddles rows) and odd.
QUANTISED = (
    Problem(
        "nf4-nested",
        Layer((70, 136, 192, 16), dropout=0.1, bias=True, base="nf4-nested"),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
    ),
    Problem(
        "nf4-straddling",
        Layer((33, 65, 96, 12), dtype=FP16, adapter=FP32, base="nf4"),
        both("64x64x64 w4 s3", "64x64x64 w4 s3"),
    ),
    Problem(
        "fp4-odd-rows",
        Layer((7, 33, 41, 3), adapter=FP32, dropout=0.3, rank_diag=True, base="fp4-nested-b32"),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
    ),
    Problem(
        "nf4-decode",
        Layer((1, 72, 128, 8), base="nf4-nested"),
        both("16x32x128 w4 s4", "16x64x128 w4 s4"),
    ),
    Problem(
        "nf4-whole-tiles",
        Layer((128, 128, 256, 16), dropout=0.1, base="nf4-nested"),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
    Problem(
        "nf4-whole-tiles-plain",
        Layer((128, 128, 256, 16), base="nf4-nested"),
        both("128x128x64 w8 s2", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)


def _dora(p: Problem) -> Problem:
    c: Layer = p.call
    rows = "zero flat" if c.rank_diag else "" if c.bias else "flat"
    learns = c.out_diag or not c.rank_diag
    options = {"dropout": c.dropout, "bias": c.bias, "strides": c.strides}
    call = Dora(
        c.shape, c.dtype, c.adapter, c.base, keep_u=learns, rows=rows, range=c.range, **options
    )
    return replace(p, call=call, strategies=(None,))  # one way, whatever the strategy


PROBLEMS = tuple(_dora(p) for p in (*problems.PROBLEMS, *QUANTISED))
