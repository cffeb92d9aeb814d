"""The base product with its LoRA branch, for the forward and for the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import (
    branch_tile,
    own_branch_tile,
    product_tile,
    store_tile,
)
from lora_kernels.ops.common.triton.tiles import grouped_tile, keep_tile
from lora_kernels.ops.common.triton_host import (
    NO_DROPOUT,
    Dropout,
    descriptor,
    precision,
    run,
    stride,
)


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
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    STRATEGY: tl.constexpr,
    BACKWARD: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    W_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    HOLD_X: tl.constexpr,
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
    """y = x·w + col ∘ keep(f · t·u) + bias; keep is the dropout mask in the backward.

    Forward: x, w = Wᵀ, q = Aᵀ, u = Bᵀ, t = rank ∘ s, f = scale, col = out_diag.
    Backward: x is dy, w = W, q = B, u = A, t = ds, f = 1, y is dx; in single_pass col is
        out_diag over the rows of q, else ds holds it.

    Shapes: x[M, K] w[K, N] q[K, R] t[M, R] u[R, N] y[M, N] rank[R] col[N] bias[N]; any strides.
        With TMA x and w are descriptors; w's box is [BN, BK] where W_ROWS, else [BK, BN].
    STRATEGY: "base" has no branch; "epilogue" reads t; "single_pass" makes s or ds = x·q in the
        main loop (R <= BR) and stores it to t; "addmm" adds the branch to a y that holds x·w.
    CHUNK > 0: w is 4-bit and decoded in the main loop, once for each row of tiles.
    Grid: [programs], each walking tiles of y in steps of `programs`.
    Sums in fp32; t is rounded to y's type before the product with u, and stored as `rank.py` says.
    """
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    # Triton 3.9 reads Hopper's sums too early where the rank's sums are in a flattened loop.
    FLATTEN: tl.constexpr = TMA and STRATEGY != "single_pass"
    # In "base" nothing is dropped.
    MASK_BRANCH: tl.constexpr = BACKWARD and DROPOUT and STRATEGY != "single_pass"
    first = tl.program_id(0)
    end = tiles_m * tiles_n
    step = programs
    if CHUNK > 0 and not TMA:  # one tile a program: then no scalars of a walk, for the stack
        end = first + 1
        step = 1
    for tile in tl.range(first, end, step, flatten=FLATTEN):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]

        if MASK_BRANCH:  # first: its words need the registers that the sums will hold
            m_keep = keep_tile(p_seed, m0 + tl.arange(0, BM), n0, stream, threshold, BM, BN)
            b_y = branch_tile(
                b_y, p_t, p_u, p_rank, m0, n0, M, N, R, stride_tm, stride_tr, stride_ur, stride_un,
                stride_rank, DTYPE, PRECISION, BM, BN, BR,
            )  # fmt: skip
            b_y = tl.where(m_keep, b_y * keep_scale, 0.0)

        if STRATEGY == "addmm":
            o_m = tl.arange(0, BM)
            o_n = tl.arange(0, BN)
            o_y = o_m[:, None] * stride_ym + o_n[None, :]
            m_y = (o_m < M - m0)[:, None] & (o_n < N - n0)[None, :]
            p_base = p_y + m0.to(tl.int64) * stride_ym + n0
            b_y += tl.load(p_base + o_y, mask=m_y, other=0.0).to(tl.float32)
        else:
            b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
            b_y, b_s = product_tile(
                b_y, b_s, x, w, p_q, p_col if BACKWARD else None, p_seed, m0, n0, M, N, K, R,
                threshold, stream, stride_xm, stride_xk, stride_wk, stride_wn, stride_qk,
                stride_qr, stride_col, STRATEGY == "single_pass", DROPOUT and not BACKWARD, TMA,
                W_ROWS, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR, HOLD_X,
                CHUNK, BLOCK, NESTED, p_absmax, p_nested, p_map, p_offset, p_table,
            )  # fmt: skip
        if STRATEGY == "single_pass":
            b_y = own_branch_tile(
                b_y, b_s, p_t, p_u, p_rank, p_col, p_seed, m0, n0, M, N, R, scale, keep_scale,
                threshold, stream, stride_tm, stride_tr, stride_ur, stride_un, stride_rank,
                stride_col, BACKWARD, DROPOUT, PRECISION, DTYPE, BM, BN, BR,
            )  # fmt: skip
        elif (
            STRATEGY != "base" and not MASK_BRANCH
        ):  # last: what it addresses is not kept through the product
            b_y = branch_tile(
                b_y, p_t, p_u, p_rank, m0, n0, M, N, R, stride_tm, stride_tr, stride_ur, stride_un,
                stride_rank, DTYPE, PRECISION, BM, BN, BR, None if BACKWARD else scale, p_col,
                stride_col,
            )  # fmt: skip
        store_tile(b_y, p_y, p_bias, m0, n0, M, N, stride_ym, stride_bias, BM, BN)


def gemm(
    strategy: str,
    config: GemmConfig,
    device: Device,
    x: Tensor,
    w: Weight,
    y: Tensor,
    t: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    *,
    scale: float = 1.0,
    dropout: Dropout = NO_DROPOUT,
    bias: Tensor | None = None,
    rank_diag: Tensor | None = None,
    out_diag: Tensor | None = None,
    backward: bool,
) -> None:
    """y = x·Wᵀ with the branch, or dx = dy·W with it (then x is dy, y is dx and t is ds); without
    one, in strategy "base", t, a and b are None."""
    m, k = x.shape
    n = y.shape[1]
    r = 0 if a is None else a.shape[0]
    q = u = None  # [K, R], [R, N]
    if a is not None and b is not None:
        q, u = (b, a) if backward else (a.T, b.T)
    tma = config.tma
    tiles = gemm_tiles(config, m, n)
    programs = min(tiles, device.multiprocessors) if tma else tiles
    # A ds that a launch before made holds both diagonals already.
    diagonals_here = not backward or strategy == "single_pass"
    run(
        _lora_gemm_kernel,
        (programs,),
        config.warps,
        config.stages,
        x=descriptor(x, [config.block_m, config.block_k]) if tma else x,
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
        stride_ym=y.stride(0),
        stride_tm=stride(t, 0),
        stride_tr=stride(t, 1),
        stride_qk=stride(q, 0),
        stride_qr=stride(q, 1),
        stride_ur=stride(u, 0),
        stride_un=stride(u, 1),
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
        HOLD_X=device.tma and dropout.on and strategy == "single_pass" and not backward,
        PRECISION=precision(x.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=block_rank(r),
        GROUP=config.group,
        **w.args(config, backward),
    )
