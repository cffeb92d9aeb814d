"""The norm of W + scale·B·A, and the scale of the output that it gives."""

import triton
import triton.language as tl

from lora_kernels.ops.common.nf4_tiles import weight_tile
from lora_kernels.ops.common.tiles import dot


@triton.jit
def scale_tile(p_magnitude, p_norm, o_n, m_n, stride_magnitude, stride_norm):
    """m̂ = magnitude / norm in fp32, and 1 where the norm is 0 or masked: a row of zeros has no
    direction to scale."""
    b_norm = tl.load(p_norm + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)
    b_magnitude = tl.load(p_magnitude + o_n * stride_magnitude, mask=m_n, other=0.0).to(tl.float32)
    m_norm = b_norm > 0
    return tl.where(m_norm, tl.math.div_rn(b_magnitude, tl.where(m_norm, b_norm, 1.0)), 1.0)


@triton.jit
def inverse_tile(p_norm, o_n, m_n, stride_norm):
    """1 / norm in fp32, and 0 where the norm is 0 or masked."""
    b_norm = tl.load(p_norm + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)
    m_norm = b_norm > 0
    return tl.where(m_norm, tl.math.div_rn(1.0, tl.where(m_norm, b_norm, 1.0)), 0.0)


@triton.jit
def _scale_kernel(p_magnitude, p_norm, p_out, N, stride_magnitude, stride_norm, BN: tl.constexpr):
    """out = m̂, as `scale_tile` makes it. N divisions; 12·N bytes.

    Shapes: magnitude[N] norm[N], out[N] in fp32. Grid: [cdiv(N, BN)].
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_m = scale_tile(p_magnitude, p_norm, o_n, m_n, stride_magnitude, stride_norm)  # [BN]
    tl.store(p_out + o_n, b_m, mask=m_n)


@triton.jit
def _norm_kernel(
    p_w,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    p_a,
    p_b,
    p_out,
    N,
    K,
    R,
    scale,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    ONE_RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """norm[n] = sqrt(Σ_k (w + scale · b·a)²[n, k]), the row in registers, a step of K at a time.

    2·N·K·(R + 2) FLOPs; bytes: w, a and b once, 4·N written. The products of 16-bit adapters are
    exact in fp32; fp32 ones are multiplied as such ("ieee"), whatever torch allows. CHUNK > 0: w is
    4-bit, decoded to fp32.
    Shapes: w[N, K] a[R, K] b[N, R], any strides; norm[N]. Grid: [cdiv(N, BN)].
    Sums in fp32, of K / BK squares in a row and then as a tree.
    """
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_n = o_n < N
    # A row past the last is the last one again, never stored: whole loads need no mask.
    o_row = tl.minimum(o_n, N - 1)
    if CHUNK > 0:
        b_table = tl.load(p_table + tl.arange(0, 16))
    else:
        p_w_tile = p_w + o_row[:, None] * stride_wn + o_k[None, :].to(tl.int64) * stride_wk
    if ONE_RANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        o_b = o_row[:, None] * stride_bn + o_r[None, :] * stride_br
        b_b = tl.load(p_b + o_b, mask=m_r[None, :], other=0.0)  # [BN, BR]
    b_squares = tl.full([BN, BK], 0.0, tl.float32)  # [BN, BK]
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if CHUNK > 0:
            b_w = weight_tile(
                p_w, p_absmax, p_nested, p_map, p_offset, b_table, tl.program_id(0) * BN, k0, N, K,
                tl.float32, BN, BK, CHUNK, BLOCK, NESTED,
            )  # [BN, BK]  # fmt: skip
        else:
            if EVEN_K:
                b_w = tl.load(p_w_tile)  # [BN, BK]
            else:
                b_w = tl.load(p_w_tile, mask=m_k[None, :], other=0.0)
            p_w_tile += BK * stride_wk
        b_t = tl.full([BN, BK], 0.0, tl.float32)  # [BN, BK]
        p_a_tile = p_a + (k0 + o_k).to(tl.int64)[None, :] * stride_ak
        if ONE_RANK:
            m_a = m_r[:, None] & m_k[None, :]
            b_a = tl.load(p_a_tile + o_r[:, None] * stride_ar, mask=m_a, other=0.0)  # [BR, BK]
            b_t = dot(b_b, b_a, b_t, "ieee")
        else:
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)
                m_r = o_r < R
                o_b = o_row[:, None] * stride_bn + o_r[None, :] * stride_br
                b_b = tl.load(p_b + o_b, mask=m_r[None, :], other=0.0)  # [BN, BR]
                m_a = m_r[:, None] & m_k[None, :]
                b_a = tl.load(p_a_tile + o_r[:, None] * stride_ar, mask=m_a, other=0.0)
                b_t = dot(b_b, b_a, b_t, "ieee")
        b_t = b_w.to(tl.float32) + b_t * scale
        b_squares += b_t * b_t
    tl.store(p_out + o_n, tl.sqrt_rn(tl.sum(b_squares, axis=1)), mask=m_n)
