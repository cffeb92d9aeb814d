"""Triton pieces of a product with a low-rank branch, one tile of the result at a time.

m0 and n0 are the tile's first row and column. Offsets within a tile fit 32 bits; what does not is
added to the pointers once. All sums are fp32.
"""

import triton
import triton.language as tl

from lora_kernels.ops.common.triton.nf4_tiles import right_tile
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    dot_rank,
    fence_copies,
    in_registers,
    keep_operand,
    keep_tile,
    rank_value,
    waited,
)


@triton.jit
def branch_tile(
    b_sum,
    p_t,
    p_u,
    p_rank,
    m0,
    n0,
    M,
    N,
    R,
    stride_tm,
    stride_tr,
    stride_ur,
    stride_un,
    stride_rank,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    factor=None,
    p_col=None,
    stride_col=1,
    p_rest=None,
    REST: tl.constexpr = False,
):
    """b_sum + (factor · rank ∘ t)·(u ∘ col) [BM, BN] of t[M, R] u[R, N] rank[R] col[N]; factors
    that are None are 1.

    Operands are rounded to DTYPE. The left side's rest is added where factor is given, for t was
    rounded before, and where REST; without factor and rank that of t itself may be given in p_rest.
    """
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = o_m < M - m0
    m_n = o_n < N - n0
    p_t += m0.to(tl.int64) * stride_tm
    p_u += n0.to(tl.int64) * stride_un
    # One stage: these few loads are not worth the shared memory and registers of a pipeline.
    for r0 in tl.range(0, R, BR, num_stages=1):
        o_r = r0 + tl.arange(0, BR)
        m_r = o_r < R
        o_t = o_m[:, None] * stride_tm + o_r[None, :] * stride_tr
        o_u = o_r[:, None] * stride_ur + o_n[None, :] * stride_un
        b_t = tl.load(p_t + o_t, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_u = tl.load(p_u + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
        if p_col is not None:
            b_col = tl.load(p_col + (n0 + o_n) * stride_col, mask=m_n, other=0.0)  # [BN]
            b_u = b_u.to(tl.float32) * b_col[None, :].to(tl.float32)
        if p_rank is not None:
            b_rank = tl.load(p_rank + o_r * stride_rank, mask=m_r, other=0.0)  # [BR]
            b_t = b_t.to(tl.float32) * b_rank[None, :].to(tl.float32)
        if factor is not None:
            b_t = b_t.to(tl.float32) * factor
        if p_rest is not None:
            p_rest_tile = p_rest + m0.to(tl.int64) * stride_tm
            b_rest = tl.load(p_rest_tile + o_t, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_sum = dot(b_rest, cast(b_u, DTYPE), b_sum, PRECISION)
        AGAIN: tl.constexpr = tl.float32 != DTYPE and (REST or factor is not None)
        b_sum = dot_rank(b_t, cast(b_u, DTYPE), b_sum, DTYPE, PRECISION, AGAIN)
    return b_sum


@triton.jit
def product_tile(
    b_y,
    b_s,
    x,
    w,
    p_q,
    p_row,
    p_seed,
    m0,
    n0,
    M,
    N,
    K,
    R,
    threshold,
    stream,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_qk,
    stride_qr,
    stride_row,
    OWN_BRANCH: tl.constexpr,
    MASK_X: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    HOLD_X: tl.constexpr = False,
    CHUNK: tl.constexpr = 0,
    BLOCK: tl.constexpr = 0,
    NESTED: tl.constexpr = 0,
    p_absmax=None,
    p_nested=None,
    p_map=None,
    p_offset=None,
    p_table=None,
):
    """b_y + x·w, and where OWN_BRANCH b_s + keep(x)·(row ∘ q) from the same tiles of x.

    Shapes: x[M, K] w[K, N] q[K, R] row[K]; b_y[BM, BN] b_s[BM, BR]. With TMA x and w are
    descriptors; w's box is [BN, BK] where W_ROWS (its rows run along K), else [BK, BN].
    HOLD_X: see `in_registers`. CHUNK > 0: w is 4-bit, its codes and scales as in `right_tile`.
    """
    MASKED: tl.constexpr = OWN_BRANCH and MASK_X
    o_k = tl.arange(0, BK)
    p_x = x
    p_w = w
    p_q_tile = p_q
    if CHUNK > 0:
        b_table = tl.load(p_table + tl.arange(0, 16))
    if not TMA:
        # What lies past the last row or column is that row or column again, never stored.
        o_m = tl.minimum(tl.arange(0, BM), M - 1 - m0)
        o_n = tl.arange(0, BN)
        p_x = x + m0.to(tl.int64) * stride_xm
        p_x += o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
        if CHUNK == 0:
            if W_ROWS:
                o_n = tl.minimum(o_n, N - 1 - n0)
                p_w = w + n0.to(tl.int64) * stride_wn
            else:  # neighbours stay neighbours under a remainder, which wide loads need
                o_n = ((n0 + o_n) % N).to(tl.int64)
            p_w += o_k[:, None] * stride_wk + o_n[None, :] * stride_wn
    if OWN_BRANCH:
        o_r = tl.arange(0, BR) % R
        p_q_tile = p_q + o_k[:, None] * stride_qk + o_r[None, :] * stride_qr
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if TMA:
            b_x = x.load([m0, k0])  # [BM, BK]
        elif EVEN_K:
            b_x = tl.load(p_x)
        else:
            b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
        if CHUNK > 0:
            b_w = right_tile(
                w, p_absmax, p_nested, p_map, p_offset, b_table, k0, n0, K, N, W_ROWS, DTYPE, BK,
                BN, CHUNK, BLOCK, NESTED,
            )  # [BK, BN]  # fmt: skip
        elif TMA:
            if W_ROWS:
                b_w = w.load([n0, k0]).T
            else:
                b_w = w.load([k0, n0])
        elif EVEN_K:
            b_w = tl.load(p_w)
        else:
            b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
        if not TMA:
            p_x += BK * stride_xk
            if CHUNK == 0:
                p_w += BK * stride_wk
        fence_copies()
        b_left = b_x
        if MASKED:
            o_rows = m0 + tl.arange(0, BM)
            m_keep = keep_operand(p_seed, o_rows, k0, stream, threshold, BM, BK)
            b_left = tl.where(m_keep, b_x, 0.0)
        if HOLD_X:
            b_x = in_registers(b_x)
        elif MASKED:
            # All of x (K > 0), but as the other product's left side is made: of a tile that is read
            # in two layouts Triton 3.9 does not swizzle the shared memory.
            b_x = tl.where(m_keep | (K > 0), b_x, 0.0)
        b_y = dot(b_x, b_w, b_y, PRECISION)
        if OWN_BRANCH:
            if EVEN_K:
                b_q = tl.load(p_q_tile)  # [BK, BR]
            else:
                b_q = tl.load(p_q_tile, mask=m_k[:, None], other=0.0)
            p_q_tile += BK * stride_qk
            if p_row is not None:
                b_row = tl.load(p_row + (k0 + o_k) * stride_row, mask=m_k, other=0.0)  # [BK]
                b_q = b_q.to(tl.float32) * b_row[:, None].to(tl.float32)
            b_q = cast(b_q, DTYPE)
            fence_copies()
            b_s = dot(b_left, b_q, b_s, PRECISION)
            if MASKED:
                b_s = waited(b_s)
    return b_y, b_s


@triton.jit
def own_branch_tile(
    b_y,
    b_s,
    p_t,
    p_u,
    p_rank,
    p_col,
    p_seed,
    m0,
    n0,
    M,
    N,
    R,
    scale,
    keep_scale,
    threshold,
    stream,
    stride_tm,
    stride_tr,
    stride_ur,
    stride_un,
    stride_rank,
    stride_col,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """b_y plus the branch of this tile's own s or ds (R <= BR), which the first column of tiles
    stores to t: s before its factor (the gradients ask for s), ds after it."""
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_m = o_m < M - m0
    m_n = o_n < N - n0
    m_r = o_r < R
    b_f = tl.full([BR], 1.0, tl.float32) * scale  # [BR]
    if p_rank is not None:
        b_f *= tl.load(p_rank + o_r * stride_rank, mask=m_r, other=0.0).to(tl.float32)
    if DROPOUT and not BACKWARD:
        b_s *= keep_scale
    if BACKWARD:
        b_s *= b_f[None, :]
    if n0 == 0:
        p_t += m0.to(tl.int64) * stride_tm
        o_t = o_m[:, None] * stride_tm + o_r[None, :] * stride_tr
        tl.store(p_t + o_t, rank_value(b_s, DTYPE), mask=m_m[:, None] & m_r[None, :])
    if not BACKWARD:
        b_s *= b_f[None, :]
    p_u += n0.to(tl.int64) * stride_un
    o_u = o_r[:, None] * stride_ur + o_n[None, :] * stride_un
    b_u = tl.load(p_u + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
    if p_col is not None and not BACKWARD:
        b_col = tl.load(p_col + (n0 + o_n) * stride_col, mask=m_n, other=0.0)  # [BN]
        b_u = b_u.to(tl.float32) * b_col[None, :].to(tl.float32)
    if BACKWARD and DROPOUT:
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        b_z = dot_rank(b_s, cast(b_u, DTYPE), b_z, DTYPE, PRECISION)
        m_keep = keep_tile(p_seed, m0 + o_m, n0, stream, threshold, BM, BN)
        b_y += tl.where(m_keep, b_z * keep_scale, 0.0)
    else:
        b_y = dot_rank(b_s, cast(b_u, DTYPE), b_y, DTYPE, PRECISION)
    return b_y


@triton.jit
def store_tile(
    b_y,
    p_y,
    p_bias,
    m0,
    n0,
    M,
    N,
    stride_ym,
    stride_bias,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = b_y + bias in y's type; y[M, N] with contiguous rows, bias[N]."""
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_n = o_n < N - n0
    if p_bias is not None:
        b_bias = tl.load(p_bias + (n0 + o_n) * stride_bias, mask=m_n, other=0.0)  # [BN]
        b_y += b_bias[None, :].to(tl.float32)
    p_y += m0.to(tl.int64) * stride_ym + n0
    o_y = o_m[:, None] * stride_ym + o_n[None, :]
    m_y = (o_m < M - m0)[:, None] & m_n[None, :]
    tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty), mask=m_y)
