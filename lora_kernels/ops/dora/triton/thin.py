"""What the backward needs of dy beside dx: one read of it, and the end of its sums."""

import triton
import triton.language as tl

from lora_kernels.ops.common.lora_tiles import branch_tile
from lora_kernels.ops.common.nf4_tiles import right_tile
from lora_kernels.ops.common.thin.sums import _sum
from lora_kernels.ops.common.tiles import cast, dot, keep_operand
from lora_kernels.ops.dora.triton.kernels import scale_tile

# Below this |m̂| what y = m̂ ∘ z keeps of z is no longer trusted: fp16 would be among its subnormal
# numbers, and at 0 nothing is left.
_SMALL_SCALE = tl.constexpr(2.0**-8)


@triton.jit
def _column_sums(b_t, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ of the rows of b_t [ROWS, COLS] in fp32, in two steps: two short chains round less."""
    b_t = tl.reshape(b_t.to(tl.float32), [8, ROWS // 8, COLS])
    return tl.sum(tl.sum(b_t, axis=0), axis=0)


@triton.jit
def _dora_pass_kernel(
    p_dy,
    p_kept,
    p_s,
    p_b,
    p_magnitude,
    p_norm,
    p_m,
    p_ds,
    p_g,
    p_dbias,
    p_dots,
    M,
    N,
    R,
    span,
    stride_dym,
    stride_dyn,
    stride_ym,
    stride_yn,
    stride_sm,
    stride_sr,
    stride_bn,
    stride_br,
    stride_magnitude,
    stride_norm,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Partial sums of ds = dy·(m̂ ∘ b), g = dyᵀ·s, dbias = Σ_m dy and dots = Σ_m dy ∘ kept, each
    where it is wanted; and m̂ itself.

    4·M·N·R FLOPs; bytes: dy and kept once, s and b, and the parts.
    Shapes: dy[M, N] kept[M, N] s[M, R] b[N, R], magnitude and norm[N]; m[N], ds[N / BN, M, R],
        g[spans, N, R], dbias and dots[spans, N] in fp32.
    Grid: [cdiv(N, BN), spans of rows, cdiv(R, BR)]; ds only where R <= BR. Sums in fp32.
    """
    dtype = p_dy.dtype.element_ty
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_r = tl.program_id(2)
    o_n = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = pid_r * BR + tl.arange(0, BR)
    m_n = o_n < N
    m_r = o_r < R
    first = pid_m * span
    last = min(first + span, M)
    if p_ds is not None or p_m is not None:
        b_m = scale_tile(p_magnitude, p_norm, o_n, m_n, stride_magnitude, stride_norm)  # [BN]
        if p_m is not None:
            if pid_m + pid_r == 0:
                tl.store(p_m + o_n, b_m, mask=m_n)
    if p_ds is not None:
        o_b = o_n[:, None] * stride_bn + o_r[None, :] * stride_br
        b_b = tl.load(p_b + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        b_b = cast(b_b.to(tl.float32) * b_m[:, None], dtype)
    b_g = tl.full([BR, BN], 0.0, tl.float32)  # [BR, BN]
    b_dbias = tl.full([BN], 0.0, tl.float32)  # [BN]
    b_dots = tl.full([BN], 0.0, tl.float32)  # [BN]
    for m0 in range(first, last, BM):
        o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < last
        m_dy = m_m[:, None]
        if not EVEN_N:
            m_dy = m_dy & m_n[None, :]
        o_dy = o_m[:, None] * stride_dym + o_n[None, :] * stride_dyn
        b_dy = tl.load(p_dy + o_dy, mask=m_dy, other=0.0)  # [BM, BN]
        if p_ds is not None:
            b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
            o_ds = (pid_n.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
            tl.store(p_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
        if p_g is not None:
            o_s = o_m[None, :] * stride_sm + o_r[:, None] * stride_sr
            b_s = tl.load(p_s + o_s, mask=m_m[None, :] & m_r[:, None], other=0.0)  # [BR, BM]
            b_g = dot(cast(b_s, dtype), b_dy, b_g, PRECISION)
        if p_dbias is not None:
            b_dbias += _column_sums(b_dy, BM, BN)
        if p_dots is not None:
            o_kept = o_m[:, None] * stride_ym + o_n[None, :] * stride_yn
            b_kept = tl.load(p_kept + o_kept, mask=m_dy, other=0.0)  # [BM, BN]
            b_dots += _column_sums(b_dy.to(tl.float32) * b_kept.to(tl.float32), BM, BN)
    if p_g is not None:
        o_g = (pid_m.to(tl.int64) * N + o_n[None, :]) * R + o_r[:, None]
        tl.store(p_g + o_g, b_g, mask=m_n[None, :] & m_r[:, None])
    o_part = pid_m.to(tl.int64) * N + o_n
    if pid_r == 0:
        if p_dbias is not None:
            tl.store(p_dbias + o_part, b_dbias, mask=m_n)
        if p_dots is not None:
            tl.store(p_dots + o_part, b_dots, mask=m_n)


@triton.jit
def _dots_again(
    p_dy,
    p_x,
    p_s,
    p_w,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    p_b,
    p_seed,
    n0,
    M,
    N,
    K,
    R,
    scale,
    keep_scale,
    threshold,
    stream,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_sr,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Σ_m dy ∘ z of the columns n0.. [BN], z = drop(x)·wᵀ + scale · s·bᵀ made a tile at a time.

    Shapes: dy[M, N] x[M, K] s[M, R] w[N, K] b[N, R]. CHUNK > 0: w is 4-bit.
    Sums in fp32; z is not rounded.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    o_n = (n0 + tl.arange(0, BN)).to(tl.int64)
    m_n = o_n < N
    if CHUNK > 0:
        b_table = tl.load(p_table + tl.arange(0, 16))
    b_dots = tl.full([BN], 0.0, tl.float32)  # [BN]
    for m0 in range(0, M, BM):
        o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < M
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        for k0 in range(0, K, BK):
            o_k = (k0 + tl.arange(0, BK)).to(tl.int64)
            m_k = o_k < K
            o_x = o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
            b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
            if DROPOUT:
                m_keep = keep_operand(p_seed, o_m, k0, stream, threshold, BM, BK)
                b_x = tl.where(m_keep, b_x, 0.0)
            if CHUNK > 0:
                b_w = right_tile(
                    p_w, p_absmax, p_nested, p_map, p_offset, b_table, k0, n0, K, N, True, dtype,
                    BK, BN, CHUNK, BLOCK, NESTED,
                )  # [BK, BN]  # fmt: skip
            else:
                o_w = o_k[:, None] * stride_wk + o_n[None, :] * stride_wn
                b_w = tl.load(p_w + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_z = dot(b_x, b_w, b_z, PRECISION)
        b_t = branch_tile(
            tl.full([BM, BN], 0.0, tl.float32), p_s, p_b, None, tl.cast(m0, tl.int32), n0, M, N, R,
            stride_sm, stride_sr, stride_br, stride_bn, 1, dtype, PRECISION, BM, BN, BR,
        )  # fmt: skip
        b_z = b_z * keep_scale + b_t * scale
        o_dy = o_m[:, None] * stride_dym + o_n[None, :] * stride_dyn
        m_dy = m_m[:, None] & m_n[None, :]
        b_dy = tl.load(p_dy + o_dy, mask=m_dy, other=0.0)  # [BM, BN]
        # A product may be fused into the sum, its own share unrounded: lanes that share a result
        # would differ in the last bit. A selected value is not.
        b_dots += _column_sums(tl.where(m_dy, b_dy.to(tl.float32) * b_z, 0.0), BM, BN)
    return b_dots


@triton.jit
def _dora_finish_kernel(
    p_parts_ds,
    p_ds,
    p_rest,
    p_g,
    p_db,
    p_parts_bias,
    p_dbias,
    p_dots,
    p_dmagnitude,
    p_magnitude,
    p_norm,
    p_dy,
    p_x,
    p_s,
    p_w,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    p_b,
    p_seed,
    M,
    N,
    K,
    R,
    size_ds,
    parts_ds,
    parts,
    scale,
    keep_scale,
    threshold,
    stream,
    stride_magnitude,
    stride_norm,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_sm,
    stride_sr,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    blocks,
    KEPT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """The pass's parts added in their order: db = scale · m̂ ∘ g, dbias, dmagnitude and
    ds = scale · Σ parts (rest: what rounding takes from it), each where it is wanted.

    dmagnitude is Σ_m dy ∘ z / norm, and 0 where the norm is 0. The dots are of z where KEPT is
    "z"; of y, to be divided by the magnitude, where it is "y", but |m̂| < 2^-8 leaves too little of
    z in y: a block with such a column makes z again, and so does every block where KEPT is "".

    (R + 2)·N·parts additions; bytes: the parts once, the results. A block that makes z again does
    2·M·(K + R) FLOPs a column and reads x.
    Shapes: as in `_dora_pass_kernel`; db[N, R], dmagnitude and dbias[N], x[M, K] w[N, K].
    Grid: [`blocks` of BN columns, then blocks of ds]. Sums in fp32.
    """
    pid = tl.program_id(0)
    if pid < blocks:
        o_n = (pid * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = o_n < N
        b_m = scale_tile(p_magnitude, p_norm, o_n, m_n, stride_magnitude, stride_norm)  # [BN]
        if p_db is not None:
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)
                m_g = m_n[:, None] & (o_r < R)[None, :]
                o_g = o_n[:, None] * R + o_r[None, :]
                p_part = p_g
                b_g = tl.full([BN, BR], 0.0, tl.float32)  # [BN, BR]
                for _ in range(parts):
                    b_g += tl.load(p_part + o_g, mask=m_g, other=0.0)
                    p_part += tl.cast(N, tl.int64) * R
                b_g *= (b_m * scale)[:, None]
                tl.store(p_db + o_g, cast(b_g, p_db.dtype.element_ty), mask=m_g)
        if p_dbias is not None:
            p_part = p_parts_bias
            b_sum = tl.full([BN], 0.0, tl.float32)  # [BN]
            for _ in range(parts):
                b_sum += tl.load(p_part + o_n, mask=m_n, other=0.0)
                p_part += N
            tl.store(p_dbias + o_n, cast(b_sum, p_dbias.dtype.element_ty), mask=m_n)
        if p_dmagnitude is not None:
            b_norm = tl.load(p_norm + o_n * stride_norm, mask=m_n, other=0.0).to(tl.float32)
            m_norm = b_norm > 0
            b_by = tl.where(m_norm, b_norm, 1.0)
            b_total = tl.full([BN], 0.0, tl.float32)  # [BN]
            m_again = m_norm
            if KEPT != "":
                p_part = p_dots
                for _ in range(parts):
                    b_total += tl.load(p_part + o_n, mask=m_n, other=0.0)
                    p_part += N
            if KEPT == "y":
                m_again = m_norm & (tl.abs(b_m) < _SMALL_SCALE)
                o_magnitude = o_n * stride_magnitude
                b_by = tl.load(p_magnitude + o_magnitude, mask=m_norm & ~m_again, other=1.0)
                b_by = tl.where(m_again, b_norm, b_by.to(tl.float32))
            if KEPT != "z":
                if tl.max(m_again.to(tl.int32), axis=0) > 0:
                    b_again = _dots_again(
                        p_dy, p_x, p_s, p_w, p_absmax, p_nested, p_map, p_offset, p_table, p_b,
                        p_seed, pid * BN, M, N, K, R, scale, keep_scale, threshold, stream,
                        stride_dym, stride_dyn, stride_xm, stride_xk, stride_sm, stride_sr,
                        stride_wn, stride_wk, stride_bn, stride_br, DROPOUT, PRECISION, BM, BN, BK,
                        BR, CHUNK, BLOCK, NESTED,
                    )  # fmt: skip
                    b_total = tl.where(m_again, b_again, b_total)
            b_total = tl.where(m_norm, tl.math.div_rn(b_total, b_by), 0.0)
            dtype = p_dmagnitude.dtype.element_ty
            tl.store(p_dmagnitude + o_n, cast(b_total, dtype), mask=m_n)
    else:
        if p_ds is not None:
            _sum(
                p_parts_ds, p_ds, None, size_ds, parts_ds, R, scale, 1, pid - blocks, SUM_BLOCK,
                p_rest,
            )  # fmt: skip
