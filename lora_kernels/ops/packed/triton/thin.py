"""Rank-wide passes of several projections: x is read once for all of them."""

import triton
import triton.language as tl

from lora_kernels.ops.common.tiles import (
    cast,
    dot,
    dot_by_rank,
    fence_copies,
    keep_operand,
    rank_value,
    waited,
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


@triton.jit
def _grad_a_step(
    b_da,
    b_x,
    p_ds,
    p_seed,
    m0,
    M,
    R,
    r0,
    c0,
    threshold,
    stream,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """b_da + keep(b_x)·ds of one step of M; b_x[BC, BM]."""
    o_m = m0 + tl.arange(0, BM)
    o_r = r0 + tl.arange(0, BR)
    o_ds = o_m[:, None].to(tl.int64) * R + o_r[None, :]
    b_ds = tl.load(p_ds + o_ds, mask=(o_m < M)[:, None] & (o_r < R)[None, :], other=0.0)
    if DROPOUT:
        b_x = tl.where(keep_operand(p_seed, o_m, c0, stream, threshold, BM, BC).T, b_x, 0.0)
    fence_copies()
    b_da = dot_by_rank(b_x, b_ds, b_da, DTYPE, PRECISION)
    if DROPOUT:
        b_da = waited(b_da)
    return b_da


@triton.jit
def _store_grad_a(b_da, p_da, o_c, K, R, r0, keep_scale, BR: tl.constexpr):
    o_r = r0 + tl.arange(0, BR)
    o_da = o_r[None, :].to(tl.int64) * K + o_c[:, None]
    m_da = (o_c < K)[:, None] & (o_r < R)[None, :]
    tl.store(p_da + o_da, cast(b_da * keep_scale, p_da.dtype.element_ty), mask=m_da)


@triton.jit
def _packed_grad_a_kernel(
    p_x,
    p_ds,
    p_da_0,
    p_da_1,
    p_da_2,
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
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """da_i = keep_scale · ds_iᵀ·keep_i(x) for up to three projections; those not asked are None.

    Shapes: x[M, K] da_i[R_i, K]; the ds_i[M, R_i] stand one after the other in ds.
    Grid: [cdiv(K, BC), cdiv(max R_i, BR)]. Sums in fp32.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    c0 = tl.program_id(0) * BC
    r0 = tl.program_id(1) * BR
    o_c = c0 + tl.arange(0, BC)
    p_x += (o_c % K)[:, None].to(tl.int64) * stride_xk
    p_ds_1 = p_ds + tl.cast(M, tl.int64) * R_0
    p_ds_2 = p_ds_1 + tl.cast(M, tl.int64) * R_1
    b_0 = tl.full([BC, BR], 0.0, tl.float32)  # [BC, BR]
    b_1 = tl.full([BC, BR], 0.0, tl.float32)
    b_2 = tl.full([BC, BR], 0.0, tl.float32)
    for m0 in range(0, M, BM):
        o_m = m0 + tl.arange(0, BM)
        o_x = o_m[None, :].to(tl.int64) * stride_xm
        b_x = tl.load(p_x + o_x, mask=(o_m < M)[None, :], other=0.0)  # [BC, BM]
        if p_da_0 is not None:
            b_0 = _grad_a_step(
                b_0, b_x, p_ds, p_seed, m0, M, R_0, r0, c0, threshold, first_stream, DROPOUT,
                PRECISION, DTYPE, BC, BM, BR,
            )  # fmt: skip
        if p_da_1 is not None:
            b_1 = _grad_a_step(
                b_1, b_x, p_ds_1, p_seed, m0, M, R_1, r0, c0, threshold, first_stream + 1,
                DROPOUT, PRECISION, DTYPE, BC, BM, BR,
            )  # fmt: skip
        if p_da_2 is not None:
            b_2 = _grad_a_step(
                b_2, b_x, p_ds_2, p_seed, m0, M, R_2, r0, c0, threshold, first_stream + 2,
                DROPOUT, PRECISION, DTYPE, BC, BM, BR,
            )  # fmt: skip
    if p_da_0 is not None:
        _store_grad_a(b_0, p_da_0, o_c, K, R_0, r0, keep_scale, BR)
    if p_da_1 is not None:
        _store_grad_a(b_1, p_da_1, o_c, K, R_1, r0, keep_scale, BR)
    if p_da_2 is not None:
        _store_grad_a(b_2, p_da_2, o_c, K, R_2, r0, keep_scale, BR)
