"""The base product scaled row by row, with its branch: the output, and the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import (
    Adapter,
    Matrix,
    Vector,
    left,
    matrix,
    tile,
    vector,
)
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import (
    branch_tile,
    left_pointers,
    product_tile,
    right_box,
    right_pointers,
    store_tile,
)
from lora_kernels.ops.common.triton.nf4_tiles import right_tile
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot,
    fence_copies,
    grouped_tile,
    in_registers,
    load_step,
    scale_tile,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, run
from lora_kernels.ops.dora.triton.dropout import unpack_mask, words_tile
from lora_kernels.ops.dora.triton.scale import inverse_tile


@triton.jit
def _pair_tile(
    b_p,
    b_q,
    x,
    base,
    p_row,
    words,
    m0,
    n0,
    M,
    N,
    K,
    DROPOUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    tile,
):
    """Two products from the same tiles of x and w. In a forward: b_p + dropped(x)·w and
    b_q + kept(x)·w, whose sum is x·w. In a backward with dropout: b_p + x·w and
    b_q + ((row − 1) ∘ x)·w; without it b_q + (row ∘ x)·w alone. What stands in brackets is rounded
    to x's type.

    Shapes: x[M, K] w[K, N] row[K], words[M, K / 16] of the mask; b_p and b_q [BM, BN]. Descriptors
        and a 4-bit w as in `product_tile`.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    BK: tl.constexpr = tile.BK
    TMA: tl.constexpr = tile.TMA
    EVEN_K: tl.constexpr = tile.EVEN_K
    PRECISION: tl.constexpr = tile.PRECISION
    W_ROWS: tl.constexpr = not BACKWARD
    MASK_X: tl.constexpr = not BACKWARD
    o_k = tl.arange(0, BK)
    if base.CHUNK > 0:
        b_table = tl.load(base.table + tl.arange(0, 16))
    if MASK_X:
        p_words = words_tile(words, m0, 0, M, BM, BK)
    p_x = x.p
    p_w = base.w
    if not TMA:
        p_x = left_pointers(x, m0, M, BM, BK)
        if base.CHUNK == 0:
            p_w = right_pointers(base, n0, N, W_ROWS, BK, BN)
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if TMA:
            b_x = x.p.load([m0, k0])  # [BM, BK]
        else:
            b_x = load_step(p_x, m_k[None, :], EVEN_K)
            p_x += BK * x.col
        if base.CHUNK > 0:
            b_w = right_tile(base, b_table, k0, n0, K, N, W_ROWS, b_x.dtype, BK, BN)  # [BK, BN]
        elif TMA:
            b_w = right_box(base.w, k0, n0, W_ROWS)
        else:
            b_w = load_step(p_w, m_k[:, None], EVEN_K)
            p_w += BK * base.w_row
        fence_copies()
        if MASK_X:
            m_keep = unpack_mask(tl.load(p_words), BM, BK)  # [BM, BK]
            p_words += BK // 16
            b_p = dot(tl.where(m_keep, 0.0, b_x), b_w, b_p, PRECISION)
            b_left = tl.where(m_keep, b_x, 0.0)
        else:
            b_row = tl.load(p_row + k0 + o_k, mask=m_k, other=0.0)  # [BK]
            if DROPOUT:
                # x from registers, as the other product's left side is: of a mixed pair Triton 3.9
                # reads Hopper's sums before they are there.
                b_p = dot(in_registers(b_x) if tile.HOLD_X else b_x, b_w, b_p, PRECISION)
                b_row -= 1.0
            b_left = cast(b_x.to(tl.float32) * b_row[None, :], b_x.dtype)
        b_q = waited(dot(b_left, b_w, b_q, PRECISION))
    return b_p, b_q


@triton.jit
def _dora_gemm_kernel(
    x,
    y,
    p_kept,
    t,
    p_residual,
    u,
    bias,
    magnitude,
    norm,
    p_row,
    words,
    M,
    N,
    K,
    R,
    scale,
    keep_scale,
    RESIDUAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    tile,
    base,
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
        words: of x's mask in the forward, of y's in the backward; residual[M, R] what rounding took
        from t, or RESIDUAL where that is in t.
        With TMA x and w are descriptors; w's box is [BN, BK] in the forward, else [BK, BN].
        A 4-bit w is decoded in the main loop.
    Grid: [tiles of y], neighbours in time near each other. Walking several tiles, a program would
        keep what all of them share, and spill.
    Sums in fp32; t, and row ∘ x, are rounded to y's type before their products.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    DTYPE: tl.constexpr = y.p.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, tile.GROUP)
    m0 = pid_m * BM
    n0 = pid_n * BN
    b_p = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
    b_q = branch_tile(
        b_p, t, Adapter(None, 1, 1, u.p, u.row, u.col, None, 1, None, 1, R, None), None, m0, n0, M,
        N, DTYPE, tile, p_residual, RESIDUAL,
    )  # fmt: skip
    if not BACKWARD:
        b_q *= scale
    if DROPOUT or BACKWARD:
        if DROPOUT and not BACKWARD:
            b_q /= keep_scale
            b_p = b_q * (keep_scale - 1.0)
        b_p, b_q = _pair_tile(
            b_p, b_q, x, base, p_row, words, m0, n0, M, N, K, DROPOUT, BACKWARD, tile
        )
    else:
        b_s = tl.full([BM, tile.BR], 0.0, tl.float32)
        b_q, b_s = product_tile(b_q, b_s, x, base, None, None, m0, n0, M, N, K, False, False, tile)
    if BACKWARD:
        if DROPOUT:
            p_words = words_tile(words, m0, n0, M, BM, BN)
            m_keep = unpack_mask(tl.load(p_words), BM, BN)  # [BM, BN]
            b_q = b_p + tl.where(m_keep, b_q * keep_scale, 0.0)
    else:
        o_n = n0 + tl.arange(0, BN)
        b_m = scale_tile(magnitude.p, magnitude.step, norm.p, norm.step, o_n, o_n < N)
        if p_kept is not None:
            b_kept = b_q * (inverse_tile(norm, o_n, o_n < N) * keep_scale)[None, :]
            store_tile(b_kept, Matrix(p_kept, y.row, 1), Vector(None, 1), m0, n0, M, N, tile)
        if DROPOUT:
            b_q = b_p + b_q * (1.0 + keep_scale * (b_m - 1.0))[None, :]
        else:
            b_q *= b_m[None, :]
    store_tile(b_q, y, bias, m0, n0, M, N, tile)


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
    residual: Tensor | None = None,
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
    residual, of t's strides, is what rounding took from t, where t is not whole."""
    m, k = x.shape
    n = y.shape[1]
    run(
        _dora_gemm_kernel,
        (gemm_tiles(config, m, n),),
        config.warps,
        config.stages,
        x=left(x, config),
        y=matrix(y),
        p_kept=kept,
        t=matrix(t),
        p_residual=residual,
        u=matrix(u),
        bias=vector(bias),
        magnitude=vector(magnitude),
        norm=vector(norm),
        p_row=row,
        words=matrix(mask),
        M=m,
        N=n,
        K=k,
        R=t.shape[1],
        scale=float(scale),
        keep_scale=dropout.keep_scale,
        RESIDUAL=whole,
        BACKWARD=backward,
        DROPOUT=dropout.on,
        tile=tile(
            config,
            x,
            block_r=_branch_step(config, device, t.shape[1], x.element_size()),
            even_k=k % config.block_k == 0,
            hold_x=device.tma and dropout.on,
        ),
        base=w.args(config, backward),
    )


def _branch_step(config: GemmConfig, device: Device, r: int, size: int) -> int:
    """Rank columns of a step of the branch, whose operands are in flight like those of the
    product."""
    br, depth = block_rank(r), max(1, config.stages - 1)
    while br > 16 and depth * (config.block_m + config.block_n) * br * size > device.shared_bytes:
        br //= 2
    return br
