"""The sums of a split's partial results, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import constant, vector
from lora_kernels.ops.common.triton.tiles import cast, rank_value, rounding_residual
from lora_kernels.ops.common.triton_host import run

# Four elements a thread: each fp32 load is 16 bytes beside its neighbour's.
_BLOCK = 512


class Sum(NamedTuple):
    """out = factor · row ∘ rank ∘ Σ parts; parts [count, *out's shape] are fp32.

    `rank` has an element for each column of out, `row` one for each row, contiguous. `residual`, of
    out's strides, takes what rounding takes from it. `half`: out is an s or ds of fp16 activations.
    """

    parts: Tensor
    out: Tensor
    factor: float = 1.0
    rank: Tensor | None = None
    row: Tensor | None = None
    residual: Tensor | None = None
    half: bool = False


class _Sum(NamedTuple):
    """The same as the kernel takes it: R columns, `blocks` of `size` elements."""

    parts: Any
    out: Any
    factor: Any
    rank: Any
    rank_step: Any
    row: Any
    residual: Any
    HALF: Any
    count: Any
    size: Any
    R: Any
    blocks: Any


@triton.jit
def _reduce_block(c, pid, BLOCK: tl.constexpr):
    """Block pid of one sum."""
    first = pid.to(tl.int64) * BLOCK
    o_i = first + tl.arange(0, BLOCK)
    m_i = o_i < c.size
    p_parts = c.parts
    b_sum = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(c.count):
        b_sum += tl.load(p_parts + o_i, mask=m_i, other=0.0)
        p_parts += c.size
    if c.row is not None:
        # Counted from the block's first row: there 32 bits divide.
        o_row = ((first % c.R).to(tl.int32) + tl.arange(0, BLOCK)) // c.R
        b_sum *= tl.load(c.row + first // c.R + o_row, mask=m_i, other=0.0) * c.factor
    else:
        b_sum *= c.factor
    if c.rank is not None:
        o_rank = ((first % c.R).to(tl.int32) + tl.arange(0, BLOCK)) % c.R
        b_sum *= tl.load(c.rank + o_rank * c.rank_step, mask=m_i, other=0.0).to(tl.float32)
    if c.HALF:
        tl.store(c.out + o_i, rank_value(b_sum, tl.float16), mask=m_i)
    else:
        tl.store(c.out + o_i, cast(b_sum, c.out.dtype.element_ty), mask=m_i)
    if c.residual is not None:
        tl.store(c.residual + o_i, rounding_residual(b_sum, c.out.dtype.element_ty), mask=m_i)


@triton.jit
def _splitk_reduce_kernel(sums, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Each of COUNT sums: see `Sum`.

    Shapes: parts[count, size] in fp32, out and residual[size], rank[R] row[size / R].
    Grid: [the blocks of each sum, one after the other]. Parts are added in their order, in fp32.
    """
    pid = tl.program_id(0)
    for i in tl.static_range(COUNT):
        if pid.to(tl.uint32) < sums[i].blocks:  # below 0 is above all
            _reduce_block(sums[i], pid, BLOCK)
        pid -= sums[i].blocks


def splitk_reduce(sums: Sequence[Sum]) -> None:
    """Make several sums in one launch."""
    sums = [c for c in sums if c.out.numel()]
    blocks = [ceil(c.out.numel() / _BLOCK) for c in sums]
    run(
        _splitk_reduce_kernel,
        (sum(blocks),),
        4,
        2,
        sums=tuple(
            _Sum(
                c.parts,
                c.out,
                float(c.factor),
                *vector(c.rank),
                c.row,
                c.residual,
                constant(c.half),
                c.parts.shape[0],
                c.out.numel(),
                c.out.shape[-1],
                blocks[i],
            )
            for i, c in enumerate(sums)
        ),
        COUNT=len(sums),
        BLOCK=_BLOCK,
    )
