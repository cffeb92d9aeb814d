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


@triton.jit
def _project(
    x,
    w,
    p_y,
    p_t,
    p_q,
    p_u,
    p_bias,
    p_seed,
    m0,
    n0,
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
    stride_tm,
    stride_qk,
    stride_qr,
    stride_ur,
    stride_un,
    stride_bias,
    SINGLE_PASS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """One tile of y = x·w + scale·t·u + bias, t made here where SINGLE_PASS; y's rows are whole."""
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
    b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    if not SINGLE_PASS:
        b_y = branch_tile(
            b_y, p_t, p_u, None, m0, n0, M, N, R, stride_tm, 1, stride_ur, stride_un, 1, DTYPE,
            PRECISION, BM, BN, BR,
        )  # fmt: skip
        b_y *= scale
    b_y, b_s = product_tile(
        b_y, b_s, x, w, p_q, None, p_seed, m0, n0, M, N, K, R, threshold, stream, stride_xm,
        stride_xk, stride_wk, stride_wn, stride_qk, stride_qr, 1, SINGLE_PASS, DROPOUT, TMA, True,
        EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR,
    )  # fmt: skip
    if SINGLE_PASS:
        b_y = own_branch_tile(
            b_y, b_s, p_t, p_u, None, None, p_seed, m0, n0, M, N, R, scale, keep_scale, threshold,
            stream, stride_tm, 1, stride_ur, stride_un, 1, 1, False, DROPOUT, PRECISION, DTYPE, BM,
            BN, BR,
        )  # fmt: skip
    store_tile(b_y, p_y, p_bias, m0, n0, M, N, N, stride_bias, BM, BN)


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
    w_0, p_y_0, p_q_0, p_u_0, p_bias_0, N_0, R_0, scale_0, stride_wk_0, stride_wn_0, stride_qk_0,
    stride_qr_0, stride_ur_0, stride_un_0, stride_bias_0,
    w_1, p_y_1, p_q_1, p_u_1, p_bias_1, N_1, R_1, scale_1, stride_wk_1, stride_wn_1, stride_qk_1,
    stride_qr_1, stride_ur_1, stride_un_1, stride_bias_1,
    w_2, p_y_2, p_q_2, p_u_2, p_bias_2, N_2, R_2, scale_2, stride_wk_2, stride_wn_2, stride_qk_2,
    stride_qr_2, stride_ur_2, stride_un_2, stride_bias_2,
    programs,
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
):  # fmt: skip
    """y_i = x·w_i + scale_i·s_i·u_i + bias_i with s_i = keep_i(x)·q_i, for up to three projections.

    Shapes: x[M, K] w_i[K, N_i] q_i[K, R_i] u_i[R_i, N_i] y_i[M, N_i] bias_i[N_i]; s[M, Σ R_i] holds
        the s_i side by side. An absent projection's tensors are None. With TMA x and w_i are
        descriptors, w_i's boxes [BN, BK].
    Grid: [programs], each walking tiles of all y_i in steps of `programs`; neighbours share x.
    Sums in fp32; where not SINGLE_PASS s is read (R_i <= BR only where it is made).
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_0 = tl.cdiv(N_0, BN)
    tiles_1 = tiles_0 + tl.cdiv(N_1, BN)
    tiles_n = tiles_1 + tl.cdiv(N_2, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        # Loops of one round or none: branches would ask for shared memory each.
        for _ in range(0, (pid_n < tiles_0).to(tl.int32)):
            _project(
                x, w_0, p_y_0, p_s, p_q_0, p_u_0, p_bias_0, p_seed, m0, pid_n * BN, M, N_0, K, R_0,
                scale_0, keep_scale, threshold, first_stream, stride_xm, stride_xk, stride_wk_0,
                stride_wn_0, stride_sm, stride_qk_0, stride_qr_0, stride_ur_0, stride_un_0,
                stride_bias_0, SINGLE_PASS, DROPOUT, TMA, EVEN_K, PRECISION, BM, BN, BK, BR,
            )  # fmt: skip
        if w_1 is not None:
            for _ in range(0, ((pid_n >= tiles_0) & (pid_n < tiles_1)).to(tl.int32)):
                _project(
                    x, w_1, p_y_1, p_s + R_0, p_q_1, p_u_1, p_bias_1, p_seed, m0, (pid_n - tiles_0)
                    * BN, M, N_1, K, R_1, scale_1, keep_scale, threshold, first_stream + 1,
                    stride_xm, stride_xk, stride_wk_1, stride_wn_1, stride_sm, stride_qk_1,
                    stride_qr_1, stride_ur_1, stride_un_1, stride_bias_1, SINGLE_PASS, DROPOUT, TMA,
                    EVEN_K, PRECISION, BM, BN, BK, BR,
                )  # fmt: skip
        if w_2 is not None:
            for _ in range(0, (pid_n >= tiles_1).to(tl.int32)):
                _project(
                    x, w_2, p_y_2, p_s + R_0 + R_1, p_q_2, p_u_2, p_bias_2, p_seed, m0, (pid_n -
                    tiles_1) * BN, M, N_2, K, R_2, scale_2, keep_scale, threshold, first_stream + 2,
                    stride_xm, stride_xk, stride_wk_2, stride_wn_2, stride_sm, stride_qk_2,
                    stride_qr_2, stride_ur_2, stride_un_2, stride_bias_2, SINGLE_PASS, DROPOUT, TMA,
                    EVEN_K, PRECISION, BM, BN, BK, BR,
                )  # fmt: skip


@triton.jit
def _add_projection(
    b_y,
    dy,
    w,
    p_t,
    p_q,
    p_u,
    p_seed,
    m0,
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
    stride_wk,
    stride_wn,
    stride_tm,
    stride_qk,
    stride_qr,
    stride_ur,
    stride_un,
    SINGLE_PASS: tl.constexpr,
    DROPOUT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """b_y + dy·w + keep(ds·u); the branch of a ds that is given was added before."""
    b_s = tl.full([BM, BR], 0.0, tl.float32)  # [BM, BR]
    b_y, b_s = product_tile(
        b_y, b_s, dy, w, p_q, None, p_seed, m0, n0, M, N, K, R, threshold, stream, stride_dym,
        stride_dyn, stride_wk, stride_wn, stride_qk, stride_qr, 1, SINGLE_PASS, False, TMA, False,
        EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR,
    )  # fmt: skip
    if SINGLE_PASS:
        b_y = own_branch_tile(
            b_y, b_s, p_t, p_u, None, None, p_seed, m0, n0, M, N, R, scale, keep_scale, threshold,
            stream, stride_tm, 1, stride_ur, stride_un, 1, 1, True, DROPOUT, PRECISION, DTYPE, BM,
            BN, BR,
        )  # fmt: skip
    return b_y


@triton.jit
def _masked_branch(
    b_y,
    p_t,
    p_u,
    p_seed,
    m0,
    n0,
    M,
    N,
    R,
    keep_scale,
    threshold,
    stream,
    stride_tm,
    stride_ur,
    stride_un,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """b_y + keep(t·u) of a t that is given."""
    if DROPOUT:
        o_m = m0 + tl.arange(0, BM)
        m_keep = keep_tile(p_seed, o_m, n0, stream, threshold, BM, BN)
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
    else:
        b_z = b_y
    b_z = branch_tile(
        b_z, p_t, p_u, None, m0, n0, M, N, R, stride_tm, 1, stride_ur, stride_un, 1, DTYPE,
        PRECISION, BM, BN, BR,
    )  # fmt: skip
    if DROPOUT:
        b_z = b_y + tl.where(m_keep, b_z * keep_scale, 0.0)
    return b_z


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
    stride_ds,
    dy_0, w_0, p_q_0, p_u_0, K_0, R_0, scale_0, stride_dym_0, stride_dyn_0, stride_wk_0,
    stride_wn_0, stride_qk_0, stride_qr_0, stride_ur_0, stride_un_0,
    dy_1, w_1, p_q_1, p_u_1, K_1, R_1, scale_1, stride_dym_1, stride_dyn_1, stride_wk_1,
    stride_wn_1, stride_qk_1, stride_qr_1, stride_ur_1, stride_un_1,
    dy_2, w_2, p_q_2, p_u_2, K_2, R_2, scale_2, stride_dym_2, stride_dyn_2, stride_wk_2,
    stride_wn_2, stride_qk_2, stride_qr_2, stride_ur_2, stride_un_2,
    programs,
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
):  # fmt: skip
    """dx = Σ_i dy_i·w_i + keep_i(ds_i·u_i): summed in one tile, rounded once.

    Shapes: dy_i[M, K_i] w_i[K_i, N] q_i[K_i, R_i] u_i[R_i, N] dx[M, N]; ds[M, Σ R_i] holds the ds_i
        side by side, made here (scale_i·dy_i·q_i, R_i <= BR) where SINGLE_PASS. An absent
        projection's tensors are None. With TMA dy_i and w_i are descriptors, w_i's boxes [BK, BN].
    Grid: [programs], each walking tiles of dx in steps of `programs`. Sums in fp32.
    """
    DTYPE: tl.constexpr = p_dx.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        if not SINGLE_PASS:
            b_y = _masked_branch(
                b_y, p_ds, p_u_0, p_seed, m0, n0, M, N, R_0, keep_scale, threshold, first_stream,
                stride_ds, stride_ur_0, stride_un_0, DROPOUT, PRECISION, DTYPE, BM, BN, BR,
            )  # fmt: skip
            if w_1 is not None:
                b_y = _masked_branch(
                    b_y, p_ds + R_0, p_u_1, p_seed, m0, n0, M, N, R_1, keep_scale, threshold,
                    first_stream + 1, stride_ds, stride_ur_1, stride_un_1, DROPOUT, PRECISION,
                    DTYPE, BM, BN, BR,
                )  # fmt: skip
            if w_2 is not None:
                b_y = _masked_branch(
                    b_y, p_ds + R_0 + R_1, p_u_2, p_seed, m0, n0, M, N, R_2, keep_scale, threshold,
                    first_stream + 2, stride_ds, stride_ur_2, stride_un_2, DROPOUT, PRECISION,
                    DTYPE, BM, BN, BR,
                )  # fmt: skip
        b_y = _add_projection(
            b_y, dy_0, w_0, p_ds, p_q_0, p_u_0, p_seed, m0, n0, M, N, K_0, R_0, scale_0, keep_scale,
            threshold, first_stream, stride_dym_0, stride_dyn_0, stride_wk_0, stride_wn_0,
            stride_ds, stride_qk_0, stride_qr_0, stride_ur_0, stride_un_0, SINGLE_PASS, DROPOUT,
            TMA, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR,
        )  # fmt: skip
        if w_1 is not None:
            b_y = _add_projection(
                b_y, dy_1, w_1, p_ds + R_0, p_q_1, p_u_1, p_seed, m0, n0, M, N, K_1, R_1, scale_1,
                keep_scale, threshold, first_stream + 1, stride_dym_1, stride_dyn_1, stride_wk_1,
                stride_wn_1, stride_ds, stride_qk_1, stride_qr_1, stride_ur_1, stride_un_1,
                SINGLE_PASS, DROPOUT, TMA, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR,
            )  # fmt: skip
        if w_2 is not None:
            b_y = _add_projection(
                b_y, dy_2, w_2, p_ds + R_0 + R_1, p_q_2, p_u_2, p_seed, m0, n0, M, N, K_2, R_2,
                scale_2, keep_scale, threshold, first_stream + 2, stride_dym_2, stride_dyn_2,
                stride_wk_2, stride_wn_2, stride_ds, stride_qk_2, stride_qr_2, stride_ur_2,
                stride_un_2, SINGLE_PASS, DROPOUT, TMA, EVEN_K, PRECISION, DTYPE, BM, BN, BK, BR,
            )  # fmt: skip
        store_tile(b_y, p_dx, None, m0, n0, M, N, N, 1, BM, BN)
