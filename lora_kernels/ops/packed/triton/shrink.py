"""Every s_i of several projections in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import thin_rows
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
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
from lora_kernels.ops.packed.triton.groups import (
    numbered,
)


@triton.jit
def _shrink_step(
    b_s,
    b_x,
    p_q,
    p_seed,
    o_m,
    o_k,
    k0,
    K,
    R,
    r0,
    threshold,
    stream,
    stride_qk,
    stride_qr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """b_s + keep(b_x)·q of one step of K."""
    o_r = r0 + tl.arange(0, BR)
    o_q = (k0 + o_k)[:, None].to(tl.int64) * stride_qk + o_r[None, :] * stride_qr
    m_q = (o_k < K - k0)[:, None] & (o_r < R)[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)  # [BK, BR]
    if DROPOUT:
        b_x = tl.where(keep_operand(p_seed, o_m, k0, stream, threshold, BM, BK), b_x, 0.0)
    fence_copies()
    b_s = dot(b_x, cast(b_q, DTYPE), b_s, PRECISION)
    if DROPOUT:
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
    p_x,
    p_q_0,
    p_q_1,
    p_q_2,
    p_s,
    p_seed,
    M,
    K,
    R_0,
    R_1,
    R_2,
    keep_scale,
    threshold,
    first_stream,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_qk_0,
    stride_qr_0,
    stride_qk_1,
    stride_qr_1,
    stride_qk_2,
    stride_qr_2,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """s_i = keep_scale · keep_i(x)·q_i for up to three projections.

    Shapes: x[M, K] q_i[K, R_i]; s[M, Σ R_i] holds the s_i side by side.
    Grid: [cdiv(M, BM), cdiv(max R_i, BR)]. Sums in fp32.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    r0 = tl.program_id(1) * BR
    o_k = tl.arange(0, BK)
    p_x += tl.minimum(o_m, M - 1)[:, None].to(tl.int64) * stride_xm
    b_0 = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    b_1 = tl.full([BM, BR], 0.0, tl.float32)
    b_2 = tl.full([BM, BR], 0.0, tl.float32)
    for k0 in range(0, K, BK):
        o_x = (k0 + o_k)[None, :].to(tl.int64) * stride_xk
        b_x = tl.load(p_x + o_x, mask=(o_k < K - k0)[None, :], other=0.0)  # [BM, BK]
        b_0 = _shrink_step(
            b_0, b_x, p_q_0, p_seed, o_m, o_k, k0, K, R_0, r0, threshold, first_stream,
            stride_qk_0, stride_qr_0, DROPOUT, PRECISION, DTYPE, BM, BK, BR,
        )  # fmt: skip
        if p_q_1 is not None:
            b_1 = _shrink_step(
                b_1, b_x, p_q_1, p_seed, o_m, o_k, k0, K, R_1, r0, threshold, first_stream + 1,
                stride_qk_1, stride_qr_1, DROPOUT, PRECISION, DTYPE, BM, BK, BR,
            )  # fmt: skip
        if p_q_2 is not None:
            b_2 = _shrink_step(
                b_2, b_x, p_q_2, p_seed, o_m, o_k, k0, K, R_2, r0, threshold, first_stream + 2,
                stride_qk_2, stride_qr_2, DROPOUT, PRECISION, DTYPE, BM, BK, BR,
            )  # fmt: skip
    _store_part(b_0, p_s, o_m, M, R_0, r0, keep_scale, stride_sm, DTYPE, BR)
    if p_q_1 is not None:
        _store_part(b_1, p_s + R_0, o_m, M, R_1, r0, keep_scale, stride_sm, DTYPE, BR)
    if p_q_2 is not None:
        _store_part(b_2, p_s + R_0 + R_1, o_m, M, R_2, r0, keep_scale, stride_sm, DTYPE, BR)


def shrink(x: Tensor, a: Sequence[Tensor], s: Tensor, dropout: Dropout) -> None:
    """The s_i side by side, in one pass over x."""
    m, k = x.shape
    size = x.element_size()
    r = max(t.shape[0] for t in a)
    br = block_rank(r)
    config = thin_rows(m, k, planned_device(x.device), br, size)
    step = min(config.step, 64)  # three partners are in flight with x
    run(
        _packed_shrink_kernel,
        (ceil(m / config.block), ceil(r / br)),
        8 if br > 32 and config.block == 64 else config.warps,
        min(config.stages, 3),
        p_x=x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        DROPOUT=dropout.on,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=step,
        BR=br,
        **numbered(
            [
                {"p_q": t, "R": t.shape[0], "stride_qk": t.stride(1), "stride_qr": t.stride(0)}
                for t in a
            ],
            {"p_q": None, "R": 0, "stride_qk": 0, "stride_qr": 0},
        ),
    )
