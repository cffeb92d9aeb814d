"""The sum of a split K's partial results, in a fixed order."""

from __future__ import annotations

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.tiles import cast, rank_value, rounding_residual
from lora_kernels.ops.common.triton_host import run, stride

# Four elements a thread: each fp32 load is 16 bytes beside its neighbour's.
_SUM_BLOCK = 512


@triton.jit
def reduce_block(
    p_parts,
    p_out,
    p_rank,
    size,
    parts,
    R,
    factor,
    stride_rank,
    pid,
    BLOCK: tl.constexpr,
    p_residual=None,
    HALF: tl.constexpr = False,
):
    """One block of out = factor · rank ∘ Σ parts; p_residual takes the rounding residual. HALF: out
    is an s or ds of fp16 activations."""
    o_i = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    b_sum = tl.full([BLOCK], 0.0, tl.float32)
    for _ in range(parts):
        b_sum += tl.load(p_parts + o_i, mask=m_i, other=0.0)
        p_parts += size
    b_sum *= factor
    if p_rank is not None:
        b_sum *= tl.load(p_rank + (o_i % R) * stride_rank, mask=m_i, other=0.0).to(tl.float32)
    if HALF:
        tl.store(p_out + o_i, rank_value(b_sum, tl.float16), mask=m_i)
    else:
        tl.store(p_out + o_i, cast(b_sum, p_out.dtype.element_ty), mask=m_i)
    if p_residual is not None:
        tl.store(p_residual + o_i, rounding_residual(b_sum, p_out.dtype.element_ty), mask=m_i)


@triton.jit
def _splitk_reduce_kernel(
    p_parts,
    p_out,
    p_residual,
    p_rank,
    size,
    parts,
    factor,
    p_parts_2,
    p_out_2,
    size_2,
    parts_2,
    factor_2,
    R,
    stride_rank,
    blocks,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = factor · rank[i mod R] · Σ_p parts[p, i], and a second sum in the same launch.

    Shapes: parts[parts, size] fp32, out[size] of any type, residual[size] of the same type; the
        second has no rank and no residual. HALF: the first is an s or ds of fp16 activations.
    Grid: [blocks of the first, then of the second]. Parts are added in their order, in fp32.
    """
    pid = tl.program_id(0)
    if pid < blocks:
        reduce_block(
            p_parts,
            p_out,
            p_rank,
            size,
            parts,
            R,
            factor,
            stride_rank,
            pid,
            BLOCK,
            p_residual,
            HALF,
        )
    else:
        if p_parts_2 is not None:
            reduce_block(
                p_parts_2, p_out_2, None, size_2, parts_2, R, factor_2, 1, pid - blocks, BLOCK
            )


Job = tuple[Tensor, Tensor, float, Tensor | None]


def splitk_reduce(jobs: list[Job], residual: Tensor | None = None, half: bool = False) -> None:
    """out = factor · rank ∘ Σ parts for one or two (parts, out, factor, rank) in one launch.

    The first alone may have a rank, a tensor for its rounding residual, or be an s or ds of fp16
    activations (`half`).
    """
    if len(jobs) == 2 and jobs[0][1].numel() == 0:
        jobs = jobs[1:]
    parts, out, factor, rank = jobs[0]
    parts_2, out_2, factor_2, rank_2 = jobs[1] if len(jobs) > 1 else (None, None, 1.0, None)
    assert rank_2 is None
    blocks = ceil(out.numel() / _SUM_BLOCK)
    blocks_2 = 0 if out_2 is None else ceil(out_2.numel() / _SUM_BLOCK)
    run(
        _splitk_reduce_kernel,
        (blocks + blocks_2,),
        4,
        2,
        p_parts=parts,
        p_out=out,
        p_residual=residual,
        p_rank=rank,
        size=out.numel(),
        parts=parts.shape[0],
        factor=float(factor),
        p_parts_2=parts_2,
        p_out_2=out_2,
        size_2=0 if out_2 is None else out_2.numel(),
        parts_2=0 if parts_2 is None else parts_2.shape[0],
        factor_2=float(factor_2),
        R=out.shape[-1],
        stride_rank=stride(rank),
        blocks=blocks,
        HALF=half,
        BLOCK=_SUM_BLOCK,
    )
