"""One launch for several projections of one x, and one for the gradient of that x."""

import triton
import triton.language as tl

from lora_kernels.ops.common.lora_tiles import (
    branch_tile,
    own_branch_tile,
    product_tile,
    store_tile,
)
from lora_kernels.ops.common.tiles import grouped_tile, keep_tile
from lora_kernels.ops.packed.triton.kernels import pick


@triton.jit
def _pick_matrix(which, m_0, m_1, m_2, TMA: tl.constexpr):
    """m_which of pointers, or of descriptors of one box."""
    if TMA:
        matrix = m_0
        if which == 1:
            matrix = m_1
        if which == 2:
            matrix = m_2
    else:
        matrix = pick(which, m_0, m_1, m_2)
    return matrix


@triton.jit
def _pick_given(which, p_0, p_1, p_2):
    """p_which of pointers, or None of none."""
    picked = p_0
    if p_0 is not None:
        picked = pick(which, p_0, p_1, p_2)
    return picked


@triton.jit
def _packed_forward_kernel(
    x,
    p_s,
    p_seed,
    M,
    K,
    keep_scale,
    threshold,
    first_stream,
    stride_xm,
    stride_xk,
    stride_sm,
    w_0, p_absmax_0, p_nested_0, p_map_0, p_offset_0, p_y_0, p_q_0, p_u_0, p_bias_0, N_0, R_0,
    biased_0, scale_0, stride_wk_0, stride_wn_0, stride_qk_0, stride_qr_0, stride_ur_0,
    stride_un_0, stride_bias_0,
    w_1, p_absmax_1, p_nested_1, p_map_1, p_offset_1, p_y_1, p_q_1, p_u_1, p_bias_1, N_1, R_1,
    biased_1, scale_1, stride_wk_1, stride_wn_1, stride_qk_1, stride_qr_1, stride_ur_1,
    stride_un_1, stride_bias_1,
    w_2, p_absmax_2, p_nested_2, p_map_2, p_offset_2, p_y_2, p_q_2, p_u_2, p_bias_2, N_2, R_2,
    biased_2, scale_2, stride_wk_2, stride_wn_2, stride_qk_2, stride_qr_2, stride_ur_2,
    stride_un_2, stride_bias_2,
    end_0,
    end_1,
    end_2,
    programs,
    p_table,
    SINGLE_PASS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BIAS: tl.constexpr,
    TMA: tl.constexpr,
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
):  # fmt: skip
    """y_i = x·w_i + scale_i·s_i·u_i + bias_i with s_i = keep_i(x)·q_i, for up to three projections.

    Shapes: x[M, K] w_i[K, N_i] q_i[K, R_i] u_i[R_i, N_i] y_i[M, N_i] bias_i[N_i]; s[M, Σ R_i] holds
        the s_i side by side. biased_i is N_i, or 0 where there is no bias_i. Columns of tiles up
        to end_i are projection i's. With TMA x and w_i are descriptors, w_i's boxes [BN, BK].
    CHUNK > 0: every w_i is 4-bit, of one format, and decoded in the main loop.
    Grid: [programs], each walking tiles of all y_i in steps of `programs`; neighbours share x.
    Sums in fp32; where not SINGLE_PASS s is read (R_i <= BR only where it is made).
    """
    DTYPE: tl.constexpr = p_y_0.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * end_2,
        programs,
        flatten=TMA and not SINGLE_PASS,  # see lora/triton/gemm.py
        disable_licm=not SINGLE_PASS or BM < 64,
    ):
        pid_m, pid_n = grouped_tile(tile, tiles_m, end_2, GROUP)
        which = (pid_n >= end_0).to(tl.int32) + (pid_n >= end_1).to(tl.int32)
        m0 = pid_m * BM
        n0 = (pid_n - pick(which, 0, end_0, end_1)) * BN
        w = _pick_matrix(which, w_0, w_1, w_2, TMA and CHUNK == 0)
        p_absmax = _pick_given(which, p_absmax_0, p_absmax_1, p_absmax_2)
        p_nested = _pick_given(which, p_nested_0, p_nested_1, p_nested_2)
        p_map = _pick_given(which, p_map_0, p_map_1, p_map_2)
        p_offset = _pick_given(which, p_offset_0, p_offset_1, p_offset_2)
        p_q = pick(which, p_q_0, p_q_1, p_q_2)
        N = pick(which, N_0, N_1, N_2)
        R = pick(which, R_0, R_1, R_2)
        p_t = p_s + pick(which, 0, R_0, R_0 + R_1)
        p_u = pick(which, p_u_0, p_u_1, p_u_2)
        stride_ur = pick(which, stride_ur_0, stride_ur_1, stride_ur_2)
        stride_un = pick(which, stride_un_0, stride_un_1, stride_un_2)
        scale = pick(which, scale_0, scale_1, scale_2)
        stream = first_stream + which
        stride_wk = pick(which, stride_wk_0, stride_wk_1, stride_wk_2)
        stride_wn = pick(which, stride_wn_0, stride_wn_1, stride_wn_2)
        stride_qk = pick(which, stride_qk_0, stride_qk_1, stride_qk_2)
        stride_qr = pick(which, stride_qr_0, stride_qr_1, stride_qr_2)
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
        if BIAS:
            o_n = n0 + tl.arange(0, BN)
            m_bias = o_n < pick(which, biased_0, biased_1, biased_2)
            p_bias = pick(which, p_bias_0, p_bias_1, p_bias_2)
            o_bias = o_n * pick(which, stride_bias_0, stride_bias_1, stride_bias_2)
            b_bias = tl.load(p_bias + o_bias, mask=m_bias, other=0.0)  # [BN]
            b_y += b_bias[None, :].to(tl.float32)
        b_y, b_s = product_tile(
            b_y, b_s, x, w, p_q, None, p_seed, m0, n0, M, N, K, R, threshold, stream, stride_xm,
            stride_xk, stride_wk, stride_wn, stride_qk, stride_qr, 1, SINGLE_PASS, DROPOUT, TMA,
            True, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR, HOLD_X, CHUNK,
            BLOCK, NESTED, p_absmax, p_nested, p_map, p_offset, p_table,
        )  # fmt: skip
        if SINGLE_PASS:
            b_y = own_branch_tile(
                b_y, b_s, p_t, p_u, None, None, p_seed, m0, n0, M, N, R, scale, keep_scale,
                threshold, stream, stride_sm, 1, stride_ur, stride_un, 1, 1, False, DROPOUT,
                PRECISION, DTYPE, BM, BN, BR,
            )  # fmt: skip
        else:
            b_y = branch_tile(
                b_y, p_t, p_u, None, m0, n0, M, N, R, stride_sm, 1, stride_ur, stride_un, 1, DTYPE,
                PRECISION, BM, BN, BR, scale,
            )  # fmt: skip
        p_y = pick(which, p_y_0, p_y_1, p_y_2)
        store_tile(b_y, p_y, None, m0, n0, M, N, N, 1, BM, BN)


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
            dy = _pick_matrix(i, dy_0, dy_1, dy_2, TMA)
            w = _pick_matrix(i, w_0, w_1, w_2, TMA and CHUNK == 0)
            p_absmax = _pick_given(i, p_absmax_0, p_absmax_1, p_absmax_2)
            p_nested = _pick_given(i, p_nested_0, p_nested_1, p_nested_2)
            p_map = _pick_given(i, p_map_0, p_map_1, p_map_2)
            p_offset = _pick_given(i, p_offset_0, p_offset_1, p_offset_2)
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
