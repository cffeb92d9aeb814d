"""dx of several projections, summed in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, gemm_tiles
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import (
    branch_tile,
    own_branch_tile,
    product_tile,
    store_tile,
)
from lora_kernels.ops.common.triton.tiles import grouped_tile, keep_tile
from lora_kernels.ops.common.triton_host import Dropout, descriptor, precision, run
from lora_kernels.ops.packed.triton.groups import (
    numbered,
    pick,
    pick_given,
    pick_matrix,
    weight_args,
)


@triton.jit
def _packed_grad_x_kernel(
    p_dx,
    p_ds,
    p_seed,
    M,
    N,
    keep_scale,
    threshold,
    first_stream,
    count,
    dy_0, w_0, p_absmax_0, p_nested_0, p_map_0, p_offset_0, p_q_0, p_u_0, K_0, R_0, scale_0,
    stride_dym_0, stride_dyn_0, stride_wk_0, stride_wn_0, stride_qk_0, stride_qr_0,
    stride_ur_0, stride_un_0,
    dy_1, w_1, p_absmax_1, p_nested_1, p_map_1, p_offset_1, p_q_1, p_u_1, K_1, R_1, scale_1,
    stride_dym_1, stride_dyn_1, stride_wk_1, stride_wn_1, stride_qk_1, stride_qr_1,
    stride_ur_1, stride_un_1,
    dy_2, w_2, p_absmax_2, p_nested_2, p_map_2, p_offset_2, p_q_2, p_u_2, K_2, R_2, scale_2,
    stride_dym_2, stride_dyn_2, stride_wk_2, stride_wn_2, stride_qk_2, stride_qr_2,
    stride_ur_2, stride_un_2,
    programs,
    p_table,
    SINGLE_PASS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
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
):  # fmt: skip
    """dx = Σ_i dy_i·w_i + keep_i(ds_i·u_i) over i < count <= 3: summed in one tile, rounded once.

    Shapes: dy_i[M, K_i] w_i[K_i, N] q_i[K_i, R_i] u_i[R_i, N] dx[M, N]; ds_i[M, R_i] one after the
        other in ds, made here (scale_i·dy_i·q_i, R_i <= BR) where SINGLE_PASS. With TMA dy_i and
        w_i are descriptors, w_i's boxes [BK, BN].
    CHUNK > 0: every w_i is 4-bit, of one format, and decoded in the main loop.
    Grid: [programs], each walking tiles of dx in steps of `programs`. Sums in fp32.
    What could be computed before the loops would take the registers of the sums.
    """
    DTYPE: tl.constexpr = p_dx.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, disable_licm=True):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        if not SINGLE_PASS:
            for i in tl.range(0, count, disable_licm=True):
                p_u = pick(i, p_u_0, p_u_1, p_u_2)
                R = pick(i, R_0, R_1, R_2)
                p_t = p_ds + pick(i, 0, R_0, R_0 + R_1).to(tl.int64) * M
                stride_ur = pick(i, stride_ur_0, stride_ur_1, stride_ur_2)
                stride_un = pick(i, stride_un_0, stride_un_1, stride_un_2)
                if DROPOUT:
                    o_m = m0 + tl.arange(0, BM)
                    m_keep = keep_tile(p_seed, o_m, n0, first_stream + i, threshold, BM, BN)
                    b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
                else:
                    b_z = b_y
                b_z = branch_tile(
                    b_z, p_t, p_u, None, m0, n0, M, N, R, R, 1, stride_ur, stride_un, 1, DTYPE,
                    PRECISION, BM, BN, BR,
                )  # fmt: skip
                if DROPOUT:
                    b_y += tl.where(m_keep, b_z * keep_scale, 0.0)
                else:
                    b_y = b_z
        for i in tl.range(0, count, disable_licm=True):
            dy = pick_matrix(i, dy_0, dy_1, dy_2, TMA)
            w = pick_matrix(i, w_0, w_1, w_2, TMA and CHUNK == 0)
            p_absmax = pick_given(i, p_absmax_0, p_absmax_1, p_absmax_2)
            p_nested = pick_given(i, p_nested_0, p_nested_1, p_nested_2)
            p_map = pick_given(i, p_map_0, p_map_1, p_map_2)
            p_offset = pick_given(i, p_offset_0, p_offset_1, p_offset_2)
            p_q = pick(i, p_q_0, p_q_1, p_q_2)
            K = pick(i, K_0, K_1, K_2)
            R = pick(i, R_0, R_1, R_2)
            stride_dym = pick(i, stride_dym_0, stride_dym_1, stride_dym_2)
            stride_dyn = pick(i, stride_dyn_0, stride_dyn_1, stride_dyn_2)
            stride_wk = pick(i, stride_wk_0, stride_wk_1, stride_wk_2)
            stride_wn = pick(i, stride_wn_0, stride_wn_1, stride_wn_2)
            stride_qk = pick(i, stride_qk_0, stride_qk_1, stride_qk_2)
            stride_qr = pick(i, stride_qr_0, stride_qr_1, stride_qr_2)
            b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
            b_y, b_s = product_tile(
                b_y, b_s, dy, w, p_q, None, p_seed, m0, n0, M, N, K, R, 0, 0, stride_dym,
                stride_dyn, stride_wk, stride_wn, stride_qk, stride_qr, 1, SINGLE_PASS, False, TMA,
                False, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR, False, CHUNK, BLOCK, NESTED,
                p_absmax, p_nested, p_map, p_offset, p_table,
            )  # fmt: skip
            if SINGLE_PASS:
                p_u = pick(i, p_u_0, p_u_1, p_u_2)
                p_t = p_ds + pick(i, 0, R_0, R_0 + R_1).to(tl.int64) * M
                scale = pick(i, scale_0, scale_1, scale_2)
                stride_ur = pick(i, stride_ur_0, stride_ur_1, stride_ur_2)
                stride_un = pick(i, stride_un_0, stride_un_1, stride_un_2)
                b_y = own_branch_tile(
                    b_y, b_s, p_t, p_u, None, None, p_seed, m0, n0, M, N, R, scale, keep_scale,
                    threshold, first_stream + i, R, 1, stride_ur, stride_un, 1, 1, True, DROPOUT,
                    PRECISION, DTYPE, BM, BN, BR,
                )  # fmt: skip
        store_tile(b_y, p_dx, None, m0, n0, M, N, N, 1, BM, BN)


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
    box = [config.block_m, config.block_k]
    format_args, own_args = weight_args(weights, config, backward=True)
    run(
        _packed_grad_x_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        p_dx=dx,
        p_ds=ds,
        p_seed=dropout.seed,
        M=m,
        N=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        count=len(dy),
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        TMA=config.tma,
        EVEN_K=all(t.shape[1] % config.block_k == 0 for t in dy),
        PRECISION=precision(dx.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=block_rank(max(t.shape[0] for t in a)),
        GROUP=config.group,
        **format_args,
        **numbered(
            [
                {
                    **own_args[i],
                    "dy": descriptor(t, box) if config.tma else t,
                    "p_q": b[i],
                    "p_u": a[i],
                    "K": t.shape[1],
                    "R": a[i].shape[0],
                    "scale": float(scales[i]),
                    "stride_dym": t.stride(0),
                    "stride_dyn": t.stride(1),
                    "stride_qk": b[i].stride(0),
                    "stride_qr": b[i].stride(1),
                    "stride_ur": a[i].stride(0),
                    "stride_un": a[i].stride(1),
                }
                for i, t in enumerate(dy)
            ]
        ),
    )
