"""dx of several projections, summed in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, gemm_tiles
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import Matrix, Vector, left, mask, matrix, tile
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import store_tile
from lora_kernels.ops.common.triton.pick import pick, three
from lora_kernels.ops.common.triton.tiles import grouped_tile, keep_tile
from lora_kernels.ops.common.triton_host import Dropout, run
from lora_kernels.ops.packed.triton.tiles import (
    packed_branch_tile,
    packed_own_branch_tile,
    packed_product_tile,
    pick_matrix,
)


class Projection(NamedTuple):
    """One projection's arguments: dy [M, K] and its adapter's matrices."""

    dy: Matrix
    q: Matrix
    u: Matrix
    R: Any
    scale: Any
    K: Any


@triton.jit
def _packed_grad_x_kernel(
    p_dx,
    p_ds,
    mask,
    M,
    N,
    count,
    projections,
    programs,
    SINGLE_PASS: tl.constexpr,
    tile,
    bases,
):
    """dx = Σ_i dy_i·w_i + keep_i(ds_i·u_i) over i < count <= 3: summed in one tile, rounded once.

    Shapes: dy_i[M, K_i] w_i[K_i, N] q_i[K_i, R_i] u_i[R_i, N] dx[M, N]; ds_i[M, R_i] one after the
        other in ds, made here (scale_i·dy_i·q_i, R_i <= BR) where SINGLE_PASS. With TMA dy_i and
        w_i are descriptors, w_i's boxes [BK, BN].
    4-bit w_i are of one format, and decoded in the main loop.
    Grid: [programs], each walking tiles of dx in steps of `programs`. Sums in fp32.
    What could be computed before the loops would take the registers of the sums.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    p_0, p_1, p_2 = projections
    DTYPE: tl.constexpr = p_dx.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for at in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, disable_licm=True):
        pid_m, pid_n = grouped_tile(at, tiles_m, tiles_n, tile.GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        if not SINGLE_PASS:
            for i in tl.range(0, count, disable_licm=True):
                R = pick(i, p_0.R, p_1.R, p_2.R)
                p_t = p_ds + pick(i, 0, p_0.R, p_0.R + p_1.R).to(tl.int64) * M
                u = pick_matrix(i, p_0.u, p_1.u, p_2.u, False)
                if mask.DROPOUT:
                    o_m = m0 + tl.arange(0, BM)
                    m_keep = keep_tile(mask.seed, o_m, n0, mask.stream + i, mask.threshold, BM, BN)
                    b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
                else:
                    b_z = b_y
                b_z = packed_branch_tile(
                    b_z, Matrix(p_t, R, 1), u, R, None, m0, n0, M, N, DTYPE, tile
                )
                if mask.DROPOUT:
                    b_y += tl.where(m_keep, b_z * mask.keep_scale, 0.0)
                else:
                    b_y = b_z
        for i in tl.range(0, count, disable_licm=True):
            dy = pick_matrix(i, p_0.dy, p_1.dy, p_2.dy, tile.TMA)
            K = pick(i, p_0.K, p_1.K, p_2.K)
            R = pick(i, p_0.R, p_1.R, p_2.R)
            q = pick_matrix(i, p_0.q, p_1.q, p_2.q, False)
            b_s = tl.full([BM, tile.BR], 0.0, tl.float32)  # [BM, BR]
            b_y, b_s = packed_product_tile(
                b_y, b_s, i, dy, bases, q, R, mask, m0, n0, M, N, K, SINGLE_PASS, True, tile
            )
            if SINGLE_PASS:
                p_t = p_ds + pick(i, 0, p_0.R, p_0.R + p_1.R).to(tl.int64) * M
                u = pick_matrix(i, p_0.u, p_1.u, p_2.u, False)
                scale = pick(i, p_0.scale, p_1.scale, p_2.scale)
                t = Matrix(p_t, R, 1)
                b_y = packed_own_branch_tile(
                    b_y, b_s, i, t, u, R, scale, mask, m0, n0, M, N, True, DTYPE, tile
                )
        store_tile(b_y, Matrix(p_dx, N, 1), Vector(None, 1), m0, n0, M, N, tile)


def grad_x(
    dy: Sequence[Tensor],
    weights: Sequence[Weight],
    dx: Tensor,
    ds: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout: Dropout,
    config: GemmConfig,
    single_pass: bool,
) -> None:
    """dx in one launch; ds is made there where single_pass, and read otherwise."""
    m, k = dx.shape
    tiles = gemm_tiles(config, m, k)
    device = planned_device(dx.device)
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    run(
        _packed_grad_x_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        p_dx=dx,
        p_ds=ds,
        mask=mask(dropout),
        M=m,
        N=k,
        count=len(dy),
        projections=three(
            [
                Projection(
                    left(t, config),
                    matrix(b[i]),
                    matrix(a[i]),
                    a[i].shape[0],
                    float(scales[i]),
                    t.shape[1],
                )
                for i, t in enumerate(dy)
            ]
        ),
        programs=programs,
        SINGLE_PASS=single_pass,
        tile=tile(
            config,
            dx,
            block_r=block_rank(max(t.shape[0] for t in a)),
            even_k=all(t.shape[1] % config.block_k == 0 for t in dy),
        ),
        bases=three([w.args(config, backward=True) for w in weights]),
    )
