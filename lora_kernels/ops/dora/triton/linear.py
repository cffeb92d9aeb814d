"""The base product scaled row by row, with its branch: the output, and the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import branch_tile, product_tile, store_tile
from lora_kernels.ops.common.triton.nf4_tiles import right_tile
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    grouped_tile,
    in_registers,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, descriptor, precision, run, stride
from lora_kernels.ops.dora.triton.dropout import unpack_mask, words_tile
from lora_kernels.ops.dora.triton.scale import inverse_tile, scale_tile


@triton.jit
def _pair_tile(
    b_p,
    b_q,
    x,
    w,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    p_row,
    p_mask,
    m0,
    n0,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_mask,
    PAIR: tl.constexpr,
    MASK_X: tl.constexpr,
    HOLD_X: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Two products from the same tiles of x and w. Where MASK_X: b_p + dropped(x)·w and
    b_q + kept(x)·w, whose sum is x·w. Else, where PAIR: b_p + x·w and b_q + ((row − 1) ∘ x)·w; and
    where not b_q + (row ∘ x)·w alone. What stands in brackets is rounded to DTYPE. HOLD_X: see
    `in_registers`.

    Shapes: x[M, K] w[K, N] row[K], mask[M, K / 16] words; b_p and b_q [BM, BN]. Descriptors
        and a 4-bit w as in `product_tile`.
    """
    o_k = tl.arange(0, BK)
    if CHUNK > 0:
        b_table = tl.load(p_table + tl.arange(0, 16))
    if MASK_X:
        p_words = words_tile(p_mask, m0, 0, M, stride_mask, BM, BK)
    p_x = x
    p_w = w
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
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if TMA:
            b_x = x.load([m0, k0])  # [BM, BK]
        else:
            if EVEN_K:
                b_x = tl.load(p_x)
            else:
                b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
            p_x += BK * stride_xk
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
        else:
            if EVEN_K:
                b_w = tl.load(p_w)
            else:
                b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            p_w += BK * stride_wk
        fence_copies()
        if MASK_X:
            m_keep = unpack_mask(tl.load(p_words), BM, BK)  # [BM, BK]
            p_words += BK // 16
            b_p = dot(tl.where(m_keep, 0.0, b_x), b_w, b_p, PRECISION)
            b_left = tl.where(m_keep, b_x, 0.0)
        else:
            b_row = tl.load(p_row + k0 + o_k, mask=m_k, other=0.0)  # [BK]
            if PAIR:
                # x from registers, as the other product's left side is: of a mixed pair Triton 3.9
                # reads Hopper's sums before they are there.
                b_p = dot(in_registers(b_x) if HOLD_X else b_x, b_w, b_p, PRECISION)
                b_row -= 1.0
            b_left = cast(b_x.to(tl.float32) * b_row[None, :], DTYPE)
        b_q = waited(dot(b_left, b_w, b_q, PRECISION))
    return b_p, b_q


@triton.jit
def _dora_gemm_kernel(
    x,
    w,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    p_y,
    p_kept,
    p_t,
    p_rest,
    p_u,
    p_bias,
    p_magnitude,
    p_norm,
    p_row,
    p_mask,
    M,
    N,
    K,
    R,
    scale,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ym,
    stride_tm,
    stride_tr,
    stride_ur,
    stride_un,
    stride_bias,
    stride_magnitude,
    stride_norm,
    stride_mask,
    REST: tl.constexpr,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    HOLD_X: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """Forward: z = drop(x)·w + scale · t·u and y = m̂ ∘ z + (x − drop(x))·w + bias; kept = z / norm.
    Backward, of dy in x's place: y = drop'(((m̂ − 1) ∘ x)·w + t·u) + x·w; without dropout
    (m̂ ∘ x)·w + t·u.

    2·M·N·(K + R) FLOPs, with dropout 2·M·N·(2·K + R); bytes: x, w, t, u and the vectors once, y
    (and kept) written.
    Forward: w = Wᵀ, t = s, u = Bᵀ, m̂ over N from magnitude and norm. With dropout, f = keep_scale,
        Q = kept(x)·w + scale/f · t·u and P = dropped(x)·w + (f − 1)·scale/f · t·u: z = f·Q and
        y = P + (1 + f·(m̂ − 1)) ∘ Q + bias, where no large terms cancel.
    Backward: w = W, t = ds, u = A, row = m̂ over K; drop' is the forward's.

    Shapes: x[M, K] w[K, N] t[M, R] u[R, N] y[M, N] kept[M, N], magnitude, norm and bias[N], row[K];
        mask: words of x's in the forward, of y's in the backward; rest[M, R] what rounding took
        from t, or REST where that is in t.
        With TMA x and w are descriptors; w's box is [BN, BK] where W_ROWS, else [BK, BN].
        CHUNK > 0: w is 4-bit and decoded in the main loop.
    Grid: [tiles of y], neighbours in time near each other. Walking several tiles, a program would
        keep what all of them share, and spill.
    Sums in fp32; t, and row ∘ x, are rounded to y's type before their products.
    """
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)
    m0 = pid_m * BM
    n0 = pid_n * BN
    b_p = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
    b_q = branch_tile(
        b_p, p_t, p_u, None, m0, n0, M, N, R, stride_tm, stride_tr, stride_ur, stride_un, 1,
        DTYPE, PRECISION, BM, BN, BR, p_rest=p_rest, REST=REST,
    )  # fmt: skip
    if not BACKWARD:
        b_q *= scale
    if DROPOUT or BACKWARD:
        if DROPOUT and not BACKWARD:
            b_q /= keep_scale
            b_p = b_q * (keep_scale - 1.0)
        b_p, b_q = _pair_tile(
            b_p, b_q, x, w, p_absmax, p_nested, p_map, p_offset, p_table, p_row, p_mask, m0, n0,
            M, N, K, stride_xm, stride_xk, stride_wk, stride_wn, stride_mask, DROPOUT,
            not BACKWARD, HOLD_X, TMA, W_ROWS, EVEN_K, PRECISION, DTYPE, BM, BN, BK, CHUNK, BLOCK,
            NESTED,
        )  # fmt: skip
    else:
        b_s = tl.full([BM, BR], 0.0, tl.float32)
        b_q, b_s = product_tile(
            b_q, b_s, x, w, None, None, None, m0, n0, M, N, K, R, 0, 0, stride_xm, stride_xk,
            stride_wk, stride_wn, 0, 0, 0, False, False, TMA, W_ROWS, EVEN_K, PRECISION, DTYPE,
            BM, BN, BK, BR, False, CHUNK, BLOCK, NESTED, p_absmax, p_nested, p_map, p_offset,
            p_table,
        )  # fmt: skip
    if BACKWARD:
        if DROPOUT:
            p_words = words_tile(p_mask, m0, n0, M, stride_mask, BM, BN)
            m_keep = unpack_mask(tl.load(p_words), BM, BN)  # [BM, BN]
            b_q = b_p + tl.where(m_keep, b_q * keep_scale, 0.0)
    else:
        o_n = n0 + tl.arange(0, BN)
        b_m = scale_tile(p_magnitude, p_norm, o_n, o_n < N, stride_magnitude, stride_norm)
        if p_kept is not None:
            b_kept = b_q * (inverse_tile(p_norm, o_n, o_n < N, stride_norm) * keep_scale)[None, :]
            store_tile(b_kept, p_kept, None, m0, n0, M, N, stride_ym, 1, BM, BN)
        if DROPOUT:
            b_q = b_p + b_q * (1.0 + keep_scale * (b_m - 1.0))[None, :]
        else:
            b_q *= b_m[None, :]
    store_tile(b_q, p_y, p_bias, m0, n0, M, N, stride_ym, stride_bias, BM, BN)


def gemm(
    config: GemmConfig,
    device: Device,
    x: Tensor,
    w: Weight,
    y: Tensor,
    kept: Tensor | None,
    t: Tensor,
    u: Tensor,
    *,
    rest: Tensor | None = None,
    whole: bool = False,
    magnitude: Tensor | None,
    norm: Tensor | None,
    row: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: Dropout,
    backward: bool,
) -> None:
    """y and kept of x [M, K] and t = s, or dx of dy, ds and row = m̂ (then y is dx); u is [R, N].
    rest, of t's strides, is what rounding took from t, where t is not whole."""
    m, k = x.shape
    n = y.shape[1]
    tma = config.tma
    run(
        _dora_gemm_kernel,
        (gemm_tiles(config, m, n),),
        config.warps,
        config.stages,
        x=descriptor(x, [config.block_m, config.block_k]) if tma else x,
        p_y=y,
        p_kept=kept,
        p_t=t,
        p_rest=rest,
        p_u=u,
        p_bias=bias,
        p_magnitude=magnitude,
        p_norm=norm,
        p_row=row,
        p_mask=mask,
        M=m,
        N=n,
        K=k,
        R=t.shape[1],
        scale=float(scale),
        keep_scale=dropout.keep_scale,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ym=y.stride(0),
        stride_tm=t.stride(0),
        stride_tr=t.stride(1),
        stride_ur=u.stride(0),
        stride_un=u.stride(1),
        stride_bias=stride(bias),
        stride_magnitude=stride(magnitude),
        stride_norm=stride(norm),
        stride_mask=stride(mask),
        REST=whole,
        BACKWARD=backward,
        DROPOUT=dropout.on,
        HOLD_X=device.tma,
        TMA=tma,
        W_ROWS=not backward,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=_branch_step(config, device, t.shape[1], x.element_size()),
        GROUP=config.group,
        **w.args(config, backward),
    )


def _branch_step(config: GemmConfig, device: Device, r: int, size: int) -> int:
    """Rank columns of a step of the branch, whose operands are in flight like those of the
    product."""
    br, depth = block_rank(r), max(1, config.stages - 1)
    while br > 16 and depth * (config.block_m + config.block_n) * br * size > device.shared_bytes:
        br //= 2
    return br
