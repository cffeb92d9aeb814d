"""The base product with its LoRA branch, for the forward and for the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import Adapter, left, mask, matrix, tile, vector
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import (
    branch_tile,
    own_branch_tile,
    product_tile,
    store_tile,
)
from lora_kernels.ops.common.triton.tiles import grouped_tile, keep_tile
from lora_kernels.ops.common.triton_host import NO_DROPOUT, Dropout, run


@triton.jit
def _lora_gemm_kernel(
    x,
    y,
    t,
    adapter,
    bias,
    mask,
    M,
    N,
    K,
    programs,
    STRATEGY: tl.constexpr,
    BACKWARD: tl.constexpr,
    tile,
    base,
):
    """y = x·w + out ∘ keep(f · t·u) + bias; keep is the dropout mask in the backward.

    Forward: x, w = Wᵀ, q = Aᵀ, u = Bᵀ, t = rank ∘ s, f = scale, out = out_diag.
    Backward: x is dy, w = W, q = B, u = A, t = ds, f = 1, y is dx; in single_pass out is
        over the rows of q, else ds holds it.

    Shapes: x[M, K] w[K, N] q[K, R] t[M, R] u[R, N] y[M, N] rank[R] out[N] bias[N]; any strides.
        With TMA x and w are descriptors; w's box is [BN, BK] in the forward, else [BK, BN].
    STRATEGY: "base" has no branch; "epilogue" reads t; "single_pass" makes s or ds = x·q in the
        main loop (R <= BR) and stores it to t; "addmm" adds the branch to a y that holds x·w.
    A 4-bit w is decoded in the main loop, once for each row of tiles.
    Grid: [programs], each walking tiles of y in steps of `programs`.
    Sums in fp32; t is rounded to y's type before the product with u, and stored as `rank.py` says.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    DTYPE: tl.constexpr = y.p.dtype.element_ty
    tiles_m = tl.cdiv(M, tile.BM)
    tiles_n = tl.cdiv(N, tile.BN)
    # Triton 3.9 reads Hopper's sums too early where the rank's sums are in a flattened loop.
    FLATTEN: tl.constexpr = tile.TMA and STRATEGY != "single_pass"
    # In "base" nothing is dropped.
    MASK_BRANCH: tl.constexpr = BACKWARD and mask.DROPOUT and STRATEGY != "single_pass"
    first = tl.program_id(0)
    end = tiles_m * tiles_n
    step = programs
    if base.CHUNK > 0 and not tile.TMA:
        # One tile a program: then no scalars of a walk, for the stack.
        end = first + 1
        step = 1
    for at in tl.range(first, end, step, flatten=FLATTEN):
        pid_m, pid_n = grouped_tile(at, tiles_m, tiles_n, tile.GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]

        if MASK_BRANCH:  # first: its words need the registers that the sums will hold
            m_keep = keep_tile(
                mask.seed, m0 + tl.arange(0, BM), n0, mask.stream, mask.threshold, BM, BN
            )
            b_y = branch_tile(b_y, t, adapter, None, m0, n0, M, N, DTYPE, tile)
            b_y = tl.where(m_keep, b_y * mask.keep_scale, 0.0)

        if STRATEGY == "addmm":
            o_m = tl.arange(0, BM)
            o_n = tl.arange(0, BN)
            o_y = o_m[:, None] * y.row + o_n[None, :]
            m_y = (o_m < M - m0)[:, None] & (o_n < N - n0)[None, :]
            p_base = y.p + m0.to(tl.int64) * y.row + n0
            b_y += tl.load(p_base + o_y, mask=m_y, other=0.0).to(tl.float32)
        else:
            b_s = tl.full([BM, tile.BR], 0.0, tl.float32)  # [BM, BR]
            b_y, b_s = product_tile(
                b_y, b_s, x, base, adapter, mask, m0, n0, M, N, K, STRATEGY == "single_pass",
                BACKWARD, tile,
            )  # fmt: skip
        if STRATEGY == "single_pass":
            b_y = own_branch_tile(b_y, b_s, t, adapter, mask, m0, n0, M, N, BACKWARD, DTYPE, tile)
        elif STRATEGY != "base" and not MASK_BRANCH:
            # Last: what it addresses is not kept through the product.
            factor = None if BACKWARD else adapter.scale
            b_y = branch_tile(b_y, t, adapter, factor, m0, n0, M, N, DTYPE, tile)
        store_tile(b_y, y, bias, m0, n0, M, N, tile)


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
    tiles = gemm_tiles(config, m, n)
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    # A ds that a launch before made holds both diagonals already.
    diagonals_here = not backward or strategy == "single_pass"
    run(
        _lora_gemm_kernel,
        (programs,),
        config.warps,
        config.stages,
        x=left(x, config),
        y=matrix(y),
        t=matrix(t),
        adapter=Adapter(
            *(matrix(b) if backward else matrix(a, transposed=True)),
            *(matrix(a) if backward else matrix(b, transposed=True)),
            *vector(rank_diag if diagonals_here else None),
            *vector(out_diag if diagonals_here else None),
            r,
            float(scale),
        ),
        bias=vector(bias),
        mask=mask(dropout),
        M=m,
        N=n,
        K=k,
        programs=programs,
        STRATEGY=strategy,
        BACKWARD=backward,
        tile=tile(
            config,
            x,
            block_r=block_rank(r),
            even_k=k % config.block_k == 0,
            hold_x=device.tma and dropout.on and strategy == "single_pass" and not backward,
        ),
        base=w.args(config, backward),
    )
