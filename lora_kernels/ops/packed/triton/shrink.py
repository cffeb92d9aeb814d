"""Every s_i of several projections in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import shrink_config
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import mask, matrix
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    keep_operand,
    rank_value,
    waited,
)
from lora_kernels.ops.common.triton_host import (
    Dropout,
    precision,
    run,
)
from lora_kernels.ops.packed.triton.groups import three


@triton.jit
def _shrink_step(
    b_s,
    b_x,
    q,
    mask,
    which,
    o_m,
    o_k,
    k0,
    K,
    R,
    r0,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """b_s + keep(b_x)·q of one step of K."""
    o_r = r0 + tl.arange(0, BR)
    o_q = (k0 + o_k)[:, None].to(tl.int64) * q.row + o_r[None, :] * q.col
    m_q = (o_k < K - k0)[:, None] & (o_r < R)[None, :]
    b_q = tl.load(q.p + o_q, mask=m_q, other=0.0)  # [BK, BR]
    DTYPE: tl.constexpr = b_x.dtype
    if mask.DROPOUT:
        stream = mask.stream + which
        m_keep = keep_operand(mask.seed, o_m, k0, stream, mask.threshold, BM, BK)
        b_x = tl.where(m_keep, b_x, 0.0)
    fence_copies()
    b_s = dot(b_x, cast(b_q, DTYPE), b_s, PRECISION)
    if mask.DROPOUT:
        b_s = waited(b_s)
    return b_s


@triton.jit
def _store_part(
    b_s, p_s, o_m, M, R, r0, keep_scale, stride_sm, DTYPE: tl.constexpr, BR: tl.constexpr
):
    o_r = r0 + tl.arange(0, BR)
    m_s = (o_m < M)[:, None] & (o_r < R)[None, :]
    o_s = o_m[:, None].to(tl.int64) * stride_sm + o_r[None, :]
    tl.store(p_s + o_s, rank_value(b_s * keep_scale, DTYPE), mask=m_s)


@triton.jit
def _packed_shrink_kernel(
    x,
    qs,
    ranks,
    s,
    mask,
    M,
    K,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """s_i = keep_scale · keep_i(x)·q_i for up to three projections.

    Shapes: x[M, K] q_i[K, R_i]; s[M, Σ R_i] holds the s_i side by side.
    Grid: [cdiv(M, BM), cdiv(max R_i, BR)]. Sums in fp32.
    """
    DTYPE: tl.constexpr = x.p.dtype.element_ty
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    r0 = tl.program_id(1) * BR
    o_k = tl.arange(0, BK)
    p_x = x.p + tl.minimum(o_m, M - 1)[:, None].to(tl.int64) * x.row
    b_0 = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    b_1 = tl.full([BM, BR], 0.0, tl.float32)
    b_2 = tl.full([BM, BR], 0.0, tl.float32)
    for k0 in range(0, K, BK):
        o_x = (k0 + o_k)[None, :].to(tl.int64) * x.col
        b_x = tl.load(p_x + o_x, mask=(o_k < K - k0)[None, :], other=0.0)  # [BM, BK]
        b_0 = _shrink_step(
            b_0, b_x, qs[0], mask, 0, o_m, o_k, k0, K, ranks[0], r0, PRECISION, BM, BK, BR
        )
        if qs[1].p is not None:
            b_1 = _shrink_step(
                b_1, b_x, qs[1], mask, 1, o_m, o_k, k0, K, ranks[1], r0, PRECISION, BM, BK, BR
            )
        if qs[2].p is not None:
            b_2 = _shrink_step(
                b_2, b_x, qs[2], mask, 2, o_m, o_k, k0, K, ranks[2], r0, PRECISION, BM, BK, BR
            )
    _store_part(b_0, s.p, o_m, M, ranks[0], r0, mask.keep_scale, s.row, DTYPE, BR)
    if qs[1].p is not None:
        _store_part(b_1, s.p + ranks[0], o_m, M, ranks[1], r0, mask.keep_scale, s.row, DTYPE, BR)
    if qs[2].p is not None:
        _store_part(
            b_2, s.p + ranks[0] + ranks[1], o_m, M, ranks[2], r0, mask.keep_scale, s.row, DTYPE, BR
        )


def shrink(x: Tensor, a: Sequence[Tensor], s: Tensor, dropout: Dropout) -> None:
    """The s_i side by side, in one pass over x."""
    m, k = x.shape
    size = x.element_size()
    r = max(t.shape[0] for t in a)
    br = block_rank(r)
    config = shrink_config(m, k, planned_device(x.device), br, size)
    step = min(config.step, 64)  # three partners are in flight with x
    run(
        _packed_shrink_kernel,
        (ceil(m / config.block), ceil(r / br)),
        8 if br > 32 and config.block == 64 else config.warps,
        min(config.stages, 3),
        x=matrix(x),
        qs=three([matrix(t, transposed=True) for t in a], matrix(None)),
        ranks=three([t.shape[0] for t in a], 0),
        s=matrix(s),
        mask=mask(dropout),
        M=m,
        K=k,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=step,
        BR=br,
    )
