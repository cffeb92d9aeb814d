"""Triton pieces of a product with a low-rank branch, one tile of the result at a time.

m0 and n0 are the tile's first row and column. Offsets within a tile fit 32 bits; what does not is
added to the pointers once. All sums are fp32. `arguments.py` says what is in a group.
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
    load_step,
    rank_value,
    waited,
)


@triton.jit
def branch_tile(
    b_sum,
    t,
    adapter,
    factor,
    m0,
    n0,
    M,
    N,
    DTYPE: tl.constexpr,
    tile,
    p_residual=None,
    RESIDUAL: tl.constexpr = False,
):
    """b_sum + (factor · rank ∘ t)·(u ∘ out) [BM, BN] of t[M, R] u[R, N] rank[R] out[N]; factors
    that are None are 1.

    Operands are rounded to DTYPE. The left side's rounding residual is added where factor is given
    (t was rounded before), and where RESIDUAL. Without factor and rank, p_residual may hold that of
    t itself.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    BR: tl.constexpr = tile.BR
    PRECISION: tl.constexpr = tile.PRECISION
    R = adapter.R
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_m = o_m < M - m0
    m_n = o_n < N - n0
    p_t = t.p + m0.to(tl.int64) * t.row
    p_u = adapter.u + n0.to(tl.int64) * adapter.u_col
    # One stage: these few loads are not worth the shared memory and registers of a pipeline.
    for r0 in tl.range(0, R, BR, num_stages=1):
        o_r = r0 + tl.arange(0, BR)
        m_r = o_r < R
        o_t = o_m[:, None] * t.row + o_r[None, :] * t.col
        o_u = o_r[:, None] * adapter.u_row + o_n[None, :] * adapter.u_col
        b_t = tl.load(p_t + o_t, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        b_u = tl.load(p_u + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
        if adapter.out is not None:
            b_col = tl.load(
                adapter.out + (n0 + o_n) * adapter.out_step, mask=m_n, other=0.0
            )  # [BN]
            b_u = b_u.to(tl.float32) * b_col[None, :].to(tl.float32)
        if adapter.rank is not None:
            b_rank = tl.load(adapter.rank + o_r * adapter.rank_step, mask=m_r, other=0.0)  # [BR]
            b_t = b_t.to(tl.float32) * b_rank[None, :].to(tl.float32)
        if factor is not None:
            b_t = b_t.to(tl.float32) * factor
        if p_residual is not None:
            p_residual_tile = p_residual + m0.to(tl.int64) * t.row
            b_residual = tl.load(p_residual_tile + o_t, mask=m_m[:, None] & m_r[None, :], other=0.0)
            b_sum = dot(b_residual, cast(b_u, DTYPE), b_sum, PRECISION)
        AGAIN: tl.constexpr = tl.float32 != DTYPE and (RESIDUAL or factor is not None)
        b_sum = dot_rank(b_t, cast(b_u, DTYPE), b_sum, DTYPE, PRECISION, AGAIN)
    return b_sum


@triton.jit
def left_pointers(x, m0, M, BM: tl.constexpr, BK: tl.constexpr):
    """Pointers to the first step's tile [BM, BK] of x. A row past the last is the last one again,
    never stored."""
    o_m = tl.minimum(tl.arange(0, BM), M - 1 - m0)
    p_x = x.p + m0.to(tl.int64) * x.row
    return p_x + (o_m[:, None] * x.row + tl.arange(0, BK)[None, :] * x.col)


@triton.jit
def right_pointers(base, n0, N, W_ROWS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """Pointers to the first step's tile [BK, BN] of a dense w; past the last column stands one that
    is not stored."""
    p_w = base.w
    o_n = tl.arange(0, BN)
    if W_ROWS:
        o_n = tl.minimum(o_n, N - 1 - n0)
        p_w += n0.to(tl.int64) * base.w_col
    else:  # neighbours stay neighbours under a remainder, which wide loads need
        o_n = ((n0 + o_n) % N).to(tl.int64)
    return p_w + (tl.arange(0, BK)[:, None] * base.w_row + o_n[None, :] * base.w_col)


@triton.jit
def right_box(w, k0, n0, W_ROWS: tl.constexpr):
    """The tile [BK, BN] of a descriptor: see `product_tile`."""
    if W_ROWS:
        b_w = w.load([n0, k0]).T
    else:
        b_w = w.load([k0, n0])
    return b_w


@triton.jit
def product_tile(
    b_y,
    b_s,
    x,
    base,
    adapter,
    mask,
    m0,
    n0,
    M,
    N,
    K,
    OWN_BRANCH: tl.constexpr,
    BACKWARD: tl.constexpr,
    tile,
):
    """b_y + x·w, and where OWN_BRANCH b_s + keep(x)·(out ∘ q) from the same tiles of x; the
    forward's x is masked, the backward's (dy) takes the diagonal `out`.

    Shapes: x[M, K] w[K, N] q[K, R] out[K]; b_y[BM, BN] b_s[BM, BR]. With TMA x and w are
    descriptors; w's box is [BN, BK] in the forward (its rows run along K), else [BK, BN]. A 4-bit
    w is decoded as in `right_tile`.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    BK: tl.constexpr = tile.BK
    TMA: tl.constexpr = tile.TMA
    EVEN_K: tl.constexpr = tile.EVEN_K
    PRECISION: tl.constexpr = tile.PRECISION
    W_ROWS: tl.constexpr = not BACKWARD
    MASKED: tl.constexpr = OWN_BRANCH and mask.DROPOUT and not BACKWARD
    o_k = tl.arange(0, BK)
    p_x = x.p
    p_w = base.w
    if base.CHUNK > 0:
        b_table = tl.load(base.table + tl.arange(0, 16))
    if not TMA:
        p_x = left_pointers(x, m0, M, BM, BK)
        if base.CHUNK == 0:
            p_w = right_pointers(base, n0, N, W_ROWS, BK, BN)
    if OWN_BRANCH:
        o_r = tl.arange(0, tile.BR) % adapter.R
        p_q_tile = adapter.q + o_k[:, None] * adapter.q_row + o_r[None, :] * adapter.q_col
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if TMA:
            b_x = x.p.load([m0, k0])  # [BM, BK]
        else:
            b_x = load_step(p_x, m_k[None, :], EVEN_K)
        if base.CHUNK > 0:
            b_w = right_tile(base, b_table, k0, n0, K, N, W_ROWS, b_x.dtype, BK, BN)  # [BK, BN]
        elif TMA:
            b_w = right_box(base.w, k0, n0, W_ROWS)
        else:
            b_w = load_step(p_w, m_k[:, None], EVEN_K)
        if not TMA:
            p_x += BK * x.col
            if base.CHUNK == 0:
                p_w += BK * base.w_row
        fence_copies()
        b_left = b_x
        if MASKED:
            o_rows = m0 + tl.arange(0, BM)
            m_keep = keep_operand(mask.seed, o_rows, k0, mask.stream, mask.threshold, BM, BK)
            b_left = tl.where(m_keep, b_x, 0.0)
        if tile.HOLD_X:
            b_x = in_registers(b_x)
        elif MASKED:
            # All of x (K > 0), but as the other product's left side is made: of a tile that is read
            # in two layouts Triton 3.9 does not swizzle the shared memory.
            b_x = tl.where(m_keep | (K > 0), b_x, 0.0)
        b_y = dot(b_x, b_w, b_y, PRECISION)
        if OWN_BRANCH:
            b_q = load_step(p_q_tile, m_k[:, None], EVEN_K)  # [BK, BR]
            p_q_tile += BK * adapter.q_row
            if BACKWARD:
                if adapter.out is not None:
                    o_out = (k0 + o_k) * adapter.out_step
                    b_out = tl.load(adapter.out + o_out, mask=m_k, other=0.0)  # [BK]
                    b_q = b_q.to(tl.float32) * b_out[:, None].to(tl.float32)
            b_q = cast(b_q, b_x.dtype)
            fence_copies()
            b_s = dot(b_left, b_q, b_s, PRECISION)
            if MASKED:
                b_s = waited(b_s)
    return b_y, b_s


@triton.jit
def own_branch_tile(
    b_y,
    b_s,
    t,
    adapter,
    mask,
    m0,
    n0,
    M,
    N,
    BACKWARD: tl.constexpr,
    DTYPE: tl.constexpr,
    tile,
):
    """b_y plus the branch of this tile's own s or ds (R <= BR), which the first column of tiles
    stores to t: s before its factor (the gradients ask for s), ds after it."""
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    BR: tl.constexpr = tile.BR
    PRECISION: tl.constexpr = tile.PRECISION
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_m = o_m < M - m0
    m_n = o_n < N - n0
    m_r = o_r < adapter.R
    b_f = tl.full([BR], 1.0, tl.float32) * adapter.scale  # [BR]
    if adapter.rank is not None:
        b_f *= tl.load(adapter.rank + o_r * adapter.rank_step, mask=m_r, other=0.0).to(tl.float32)
    if mask.DROPOUT and not BACKWARD:
        b_s *= mask.keep_scale
    if BACKWARD:
        b_s *= b_f[None, :]
    if n0 == 0:
        p_t = t.p + m0.to(tl.int64) * t.row
        o_t = o_m[:, None] * t.row + o_r[None, :] * t.col
        tl.store(p_t + o_t, rank_value(b_s, DTYPE), mask=m_m[:, None] & m_r[None, :])
    if not BACKWARD:
        b_s *= b_f[None, :]
    p_u = adapter.u + n0.to(tl.int64) * adapter.u_col
    o_u = o_r[:, None] * adapter.u_row + o_n[None, :] * adapter.u_col
    b_u = tl.load(p_u + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
    if adapter.out is not None and not BACKWARD:
        b_col = tl.load(adapter.out + (n0 + o_n) * adapter.out_step, mask=m_n, other=0.0)  # [BN]
        b_u = b_u.to(tl.float32) * b_col[None, :].to(tl.float32)
    if BACKWARD and mask.DROPOUT:
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        b_z = dot_rank(b_s, cast(b_u, DTYPE), b_z, DTYPE, PRECISION)
        m_keep = keep_tile(mask.seed, m0 + o_m, n0, mask.stream, mask.threshold, BM, BN)
        b_y += tl.where(m_keep, b_z * mask.keep_scale, 0.0)
    else:
        b_y = dot_rank(b_s, cast(b_u, DTYPE), b_y, DTYPE, PRECISION)
    return b_y


@triton.jit
def store_tile(b_y, y, bias, m0, n0, M, N, tile):
    """y = b_y + bias in y's type; y[M, N] with contiguous rows, bias[N]."""
    o_m = tl.arange(0, tile.BM)
    o_n = tl.arange(0, tile.BN)
    m_n = o_n < N - n0
    if bias.p is not None:
        b_bias = tl.load(bias.p + (n0 + o_n) * bias.step, mask=m_n, other=0.0)  # [BN]
        b_y += b_bias[None, :].to(tl.float32)
    p_y = y.p + m0.to(tl.int64) * y.row + n0
    o_y = o_m[:, None] * y.row + o_n[None, :]
    m_y = (o_m < M - m0)[:, None] & m_n[None, :]
    tl.store(p_y + o_y, cast(b_y, y.p.dtype.element_ty), mask=m_y)
