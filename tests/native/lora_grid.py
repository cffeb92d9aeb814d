"""A grid of linear-layer calls, generated: every size ragged, every option, the same each time."""

from __future__ import annotations

import functools
import random

import torch

from lora_kernels.ops.common.base import BLOCK_SIZES
from tests.native.lora_cases import DTYPES, REFERENCE, Base, Branch, Case

CASES = {
    "nf4_linear_fwd": 210,
    "nf4_linear_bwd": 210,
    "lora_linear_fwd": 300,
    "lora_linear_bwd": 300,
}
CHUNKS = 3  # tests of an op and dtype
REPEATED = 5_000_000  # products, all repeats together

# Either side of vectors, tiles, pairs of tiles, chunks and the crossovers between kernels.
ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 49, 63, 64, 65, 70)
SIZES = (15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 320, 385)
FEW = (1, 2, 3, 7, 8, 9)
GROUPED = (64, 128, 192, 256, 320, 384, 576)  # whole 64s, which kernels of their own decode
LONG = (1088, 2368)  # more than one block of the reduction
RANKS = (1, 2, 3, 8, 15, 16, 17, 24, 31, 32, 33, 64, 65)
ACTIVATIONS = ("contiguous", "padded-rows", "transposed", "every-other-column")


@functools.cache
def cases(op: str, dtype: torch.dtype) -> tuple[Case, ...]:
    """The distinct cases of an op and dtype, by number of threads: changing that takes time."""
    draw = random.Random(f"{op} {dtype}")
    found: dict[Case, None] = {}
    while len(found) < CASES[op]:
        case = _case(draw, op, dtype)
        # What has a tiny result is repeated often, and only then must be small as a whole.
        if case.draws == 1 or case.draws * case.m * case.base.n * case.base.k < REPEATED:
            found.setdefault(case)
    return tuple(sorted(found, key=lambda c: c.threads))


def chunk(op: str, dtype: torch.dtype, i: int) -> tuple[Case, ...]:
    """Part `i` of `CHUNKS`."""
    return cases(op, dtype)[i::CHUNKS]


def grid() -> list[Case]:
    return [case for op in REFERENCE for dtype in DTYPES for case in cases(op, dtype)]


def _case(draw: random.Random, op: str, dtype: torch.dtype) -> Case:
    lora = op.startswith("lora")
    base = _base(draw, quantised=not lora or draw.random() < 0.6, backward=op.endswith("bwd"))
    rows = [m for m in ROWS if m < 20] if max(base.n, base.k) in LONG else ROWS
    branch = _branch(draw, dtype) if lora else Branch(0, bias=draw.random() < 0.4)
    needs = None
    if op == "lora_linear_bwd" and draw.random() < 0.5:
        dense = base.block == 0
        there = (True, True, True, branch.bias, branch.rank_diag, branch.out_diag, dense)
        needs = tuple(t and draw.random() < 0.5 for t in there)
    return Case(
        op,
        draw.choice(rows),
        base,
        branch,
        dtype,
        activations=draw.choice(ACTIVATIONS),
        parameters=draw.choice(("contiguous", "padded-rows")),
        needs=needs,
        threads=draw.choice((1, 2, 3)),
    )


def _base(draw: random.Random, quantised: bool, backward: bool) -> Base:
    def size() -> int:
        return draw.choice(FEW if draw.random() < 0.1 else SIZES)

    n, k = size(), size()
    if draw.random() < 0.4:
        k = draw.choice(GROUPED)
    if draw.random() < 0.04:
        n, k = (draw.choice(LONG), k) if backward else (n, draw.choice(LONG))
    if not quantised:
        return Base(n, k)
    block = 64 if draw.random() < 0.4 else draw.choice(BLOCK_SIZES)
    return Base(n, k, block, draw.choice((0, 256, 256, 16, 4, 3)), draw.choice((0, 0, 1)))


def _branch(draw: random.Random, dtype: torch.dtype) -> Branch:
    return Branch(
        rank=draw.choice(RANKS),
        dropout_p=draw.choice((0.0, 0.0, 0.05, 0.1, 0.5, 0.9)),
        rank_diag=draw.random() < 0.3,
        out_diag=draw.random() < 0.3,
        bias=draw.random() < 0.4,
        adapters=draw.choice((None, None, torch.float32, torch.float32, torch.bfloat16)),
        scale=draw.choice((0.75, 1.0, 2.0, -16.0)),
    )
