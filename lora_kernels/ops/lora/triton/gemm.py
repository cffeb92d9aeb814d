"""The base product with its LoRA branch, for the forward and for the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.tiles import cast, dot, grouped_tile, keep_tile
from lora_kernels.ops.common.triton_host import Dropout, precision, run, stride
from lora_kernels.ops.lora.triton.strategies import block_rank


@triton.jit
def _lora_gemm_kernel(
    x,
    w,
    p_y,
    p_t,
    p_q,
    p_u,
    p_bias,
    p_rank,
    p_col,
    p_seed,
    M,
    N,
    K,
    R,
    scale,
    keep_scale,
    threshold,
    stream,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ym,
    stride_tm,
    stride_tr,
    stride_qk,
    stride_qr,
    stride_ur,
    stride_un,
    stride_rank,
    stride_col,
    stride_bias,
    programs,
    STRATEGY: tl.constexpr,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = x·w + col ∘ keep(f · t·u) + bias; keep is the dropout mask in the backward.

    Forward: x, w = Wᵀ, q = Aᵀ, u = Bᵀ, t = rank ∘ s, f = scale, col = out_diag.
    Backward: x is dy, w = W, q = B, u = A, t = ds, f = 1, y is dx; in single_pass col is
        out_diag over the rows of q, else ds holds it.

    Shapes: x[M, K] w[K, N] q[K, R] t[M, R] u[R, N] y[M, N] rank[R] col[N] bias[N]; any strides.
        With TMA x and w are descriptors; w's box is [BN, BK] where W_ROWS, else [BK, BN].
    STRATEGY: "epilogue" reads t; "single_pass" makes s or ds = x·q in the main loop (R <= BR) and
        stores it to t; "addmm" adds the branch to a y that holds x·w already.
    Grid: [programs], each walking tiles of y in steps of `programs`.
    Sums in fp32; t is rounded to y's type before the product with u.
    """
    dtype = p_y.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, flatten=TMA):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        # Offsets within the tile fit 32 bits; what does not is added to the pointers once.
        o_m = tl.arange(0, BM)
        o_n = tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        o_r = tl.arange(0, BR)
        m_m = o_m < M - m0
        m_n = o_n < N - n0
        p_y_tile = p_y + m0.to(tl.int64) * stride_ym + n0
        p_t_tile = p_t + m0.to(tl.int64) * stride_tm
        p_u_tile = p_u + n0.to(tl.int64) * stride_un
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]

        if STRATEGY != "single_pass":
            if BACKWARD and DROPOUT:  # first: its words need the registers that the sums will hold
                m_keep = keep_tile(p_seed, m0 + o_m, n0, stream, threshold, BM, BN)
            for r0 in range(0, R, BR):
                m_r = r0 + o_r < R
                o_t = o_m[:, None] * stride_tm + (r0 + o_r)[None, :] * stride_tr
                o_u = (r0 + o_r)[:, None] * stride_ur + o_n[None, :] * stride_un
                b_t = tl.load(p_t_tile + o_t, mask=m_m[:, None] & m_r[None, :], other=0.0)
                b_u = tl.load(p_u_tile + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)
                if p_rank is not None:
                    b_d = tl.load(p_rank + (r0 + o_r) * stride_rank, mask=m_r, other=0.0)  # [BR]
                    b_t = b_t.to(tl.float32) * b_d[None, :].to(tl.float32)
                b_y = dot(cast(b_t, dtype), cast(b_u, dtype), b_y, PRECISION)
            if not BACKWARD:
                b_y *= scale
            if p_col is not None:
                b_col = tl.load(p_col + (n0 + o_n) * stride_col, mask=m_n, other=0.0)  # [BN]
                b_y *= b_col[None, :].to(tl.float32)
            if BACKWARD and DROPOUT:
                b_y = tl.where(m_keep, b_y * keep_scale, 0.0)

        if STRATEGY == "addmm":
            o_y = o_m[:, None] * stride_ym + o_n[None, :]
            b_base = tl.load(p_y_tile + o_y, mask=m_m[:, None] & m_n[None, :], other=0.0)
            b_y += b_base.to(tl.float32)
        else:
            # What lies past the last row or column is that row or column again, never stored.
            p_x = x
            p_w = w
            p_q_tile = p_q
            if not TMA:
                o_last_m = tl.minimum(o_m, M - 1 - m0)
                p_x = x + m0.to(tl.int64) * stride_xm
                p_x += o_last_m[:, None] * stride_xm + o_k[None, :] * stride_xk
                if W_ROWS:
                    o_last_n = tl.minimum(o_n, N - 1 - n0)
                    p_w = w + n0.to(tl.int64) * stride_wn
                    p_w += o_k[:, None] * stride_wk + o_last_n[None, :] * stride_wn
                else:  # neighbours stay neighbours under a remainder, which wide loads need
                    o_last_n = ((n0 + o_n) % N).to(tl.int64)
                    p_w = w + o_k[:, None] * stride_wk + o_last_n[None, :] * stride_wn
            if STRATEGY == "single_pass":
                o_last_r = o_r % R
                p_q_tile = p_q + o_k[:, None] * stride_qk + o_last_r[None, :] * stride_qr
            b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
            for k0 in range(0, K, BK):
                m_k = o_k < K - k0
                if TMA:
                    b_x = x.load([m0, k0])  # [BM, BK]
                    if W_ROWS:
                        b_w = w.load([n0, k0]).T  # [BK, BN]
                    else:
                        b_w = w.load([k0, n0])
                else:
                    if EVEN_K:
                        b_x = tl.load(p_x)
                        b_w = tl.load(p_w)
                    else:
                        b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
                        b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
                    p_x += BK * stride_xk
                    p_w += BK * stride_wk
                b_y = dot(b_x, b_w, b_y, PRECISION)
                if STRATEGY == "single_pass":
                    if EVEN_K:
                        b_q = tl.load(p_q_tile)  # [BK, BR]
                    else:
                        b_q = tl.load(p_q_tile, mask=m_k[:, None], other=0.0)
                    p_q_tile += BK * stride_qk
                    if BACKWARD:
                        if p_col is not None:
                            b_col = tl.load(p_col + (k0 + o_k) * stride_col, mask=m_k, other=0.0)
                            b_q = b_q.to(tl.float32) * b_col[:, None].to(tl.float32)
                    b_left = b_x
                    if DROPOUT and not BACKWARD:
                        m_keep = keep_tile(p_seed, m0 + o_m, k0, stream, threshold, BM, BK)
                        b_left = tl.where(m_keep, b_x, 0.0)
                    b_s = dot(b_left, cast(b_q, dtype), b_s, PRECISION)

            if STRATEGY == "single_pass":
                m_r = o_r < R
                b_f = tl.full([BR], 1.0, tl.float32) * scale  # [BR]
                if p_rank is not None:
                    b_d = tl.load(p_rank + o_r * stride_rank, mask=m_r, other=0.0)
                    b_f *= b_d.to(tl.float32)
                if DROPOUT and not BACKWARD:
                    b_s *= keep_scale
                # s is kept before the factor (the gradients ask for s), ds after it.
                if BACKWARD:
                    b_s *= b_f[None, :]
                if pid_n == 0:
                    o_t = o_m[:, None] * stride_tm + o_r[None, :] * stride_tr
                    tl.store(p_t_tile + o_t, cast(b_s, dtype), mask=m_m[:, None] & m_r[None, :])
                if not BACKWARD:
                    b_s *= b_f[None, :]
                o_u = o_r[:, None] * stride_ur + o_n[None, :] * stride_un
                b_u = tl.load(p_u_tile + o_u, mask=m_r[:, None] & m_n[None, :], other=0.0)
                if p_col is not None and not BACKWARD:
                    b_col = tl.load(p_col + (n0 + o_n) * stride_col, mask=m_n, other=0.0)
                    b_u = b_u.to(tl.float32) * b_col[None, :].to(tl.float32)
                if BACKWARD and DROPOUT:
                    b_z = tl.full([BM, BN], 0.0, tl.float32)
                    b_z = dot(cast(b_s, dtype), cast(b_u, dtype), b_z, PRECISION)
                    m_keep = keep_tile(p_seed, m0 + o_m, n0, stream, threshold, BM, BN)
                    b_y += tl.where(m_keep, b_z * keep_scale, 0.0)
                else:
                    b_y = dot(cast(b_s, dtype), cast(b_u, dtype), b_y, PRECISION)

        if p_bias is not None:
            b_bias = tl.load(p_bias + (n0 + o_n) * stride_bias, mask=m_n, other=0.0)  # [BN]
            b_y += b_bias[None, :].to(tl.float32)
        o_y = o_m[:, None] * stride_ym + o_n[None, :]
        tl.store(p_y_tile + o_y, cast(b_y, dtype), mask=m_m[:, None] & m_n[None, :])


def gemm(
    strategy: str,
    config: GemmConfig,
    device: Device,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    t: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    dropout: Dropout,
    bias: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    backward: bool,
) -> None:
    """y = x·Wᵀ with the branch, or dx = dy·W with it (then x is dy, y is dx and t is ds)."""
    m, k = x.shape
    n = y.shape[1]
    r = a.shape[0]
    q, u = (b, a) if backward else (a.T, b.T)  # [K, R], [R, N]
    tma = config.tma
    x_arg, w_arg = x, w
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        box = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
        x_arg = TensorDescriptor.from_tensor(x, [config.block_m, config.block_k])
        w_arg = TensorDescriptor.from_tensor(w, box)
    wk, wn = (w.stride(0), w.stride(1)) if backward else (w.stride(1), w.stride(0))
    tiles = gemm_tiles(config, m, n)
    programs = min(tiles, device.multiprocessors) if tma else tiles
    # A ds that a launch before made holds both diagonals already.
    diagonals_here = not backward or strategy == "single_pass"
    run(
        _lora_gemm_kernel,
        (programs,),
        config.warps,
        config.stages,
        x=x_arg,
        w=w_arg,
        p_y=y,
        p_t=t,
        p_q=q,
        p_u=u,
        p_bias=bias,
        p_rank=rank_diag if diagonals_here else None,
        p_col=out_diag if diagonals_here else None,
        p_seed=dropout.seed,
        M=m,
        N=n,
        K=k,
        R=r,
        scale=float(scale),
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wk=wk,
        stride_wn=wn,
        stride_ym=y.stride(0),
        stride_tm=t.stride(0),
        stride_tr=t.stride(1),
        stride_qk=q.stride(0),
        stride_qr=q.stride(1),
        stride_ur=u.stride(0),
        stride_un=u.stride(1),
        stride_rank=stride(rank_diag),
        stride_col=stride(out_diag),
        stride_bias=stride(bias),
        programs=programs,
        STRATEGY=strategy,
        BACKWARD=backward,
        DROPOUT=dropout.on,
        TMA=tma,
        W_ROWS=not backward,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=block_rank(r),
        GROUP=config.group,
    )
