"""Several projections of one x in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import (
    branch_tile,
    own_branch_tile,
    product_tile,
    store_tile,
)
from lora_kernels.ops.common.triton.tiles import grouped_tile
from lora_kernels.ops.common.triton_host import (
    Dropout,
    descriptor,
    precision,
    run,
    stride,
)
from lora_kernels.ops.packed.triton.groups import (
    ends,
    numbered,
    pick,
    pick_given,
    pick_matrix,
    weight_args,
)


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
        flatten=TMA and not SINGLE_PASS,  # see common/triton/linear.py
        disable_licm=not SINGLE_PASS or BM < 64,
    ):
        pid_m, pid_n = grouped_tile(tile, tiles_m, end_2, GROUP)
        which = (pid_n >= end_0).to(tl.int32) + (pid_n >= end_1).to(tl.int32)
        m0 = pid_m * BM
        n0 = (pid_n - pick(which, 0, end_0, end_1)) * BN
        w = pick_matrix(which, w_0, w_1, w_2, TMA and CHUNK == 0)
        p_absmax = pick_given(which, p_absmax_0, p_absmax_1, p_absmax_2)
        p_nested = pick_given(which, p_nested_0, p_nested_1, p_nested_2)
        p_map = pick_given(which, p_map_0, p_map_1, p_map_2)
        p_offset = pick_given(which, p_offset_0, p_offset_1, p_offset_2)
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


def project(
    x: Tensor,
    weights: Sequence[Weight],
    y: Sequence[Tensor],
    s: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scales: Sequence[float],
    dropout: Dropout,
    config: GemmConfig,
    single_pass: bool,
) -> None:
    """Every y_i in one launch; s is made there where single_pass, and read otherwise."""
    m, k = x.shape
    device = planned_device(x.device)
    end = ends([t.shape[1] for t in y], config.block_n)
    tiles = ceil(m / config.block_m) * end[-1]
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    format_args, own_args = weight_args(weights, config, backward=False)
    some_bias = next((t for t in bias if t is not None), None)
    run(
        _packed_forward_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        x=descriptor(x, [config.block_m, config.block_k]) if config.tma else x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        end_0=end[0],
        end_1=end[1],
        end_2=end[2],
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        BIAS=some_bias is not None,
        TMA=config.tma,
        EVEN_K=k % config.block_k == 0,
        HOLD_X=device.tma and dropout.on and single_pass,
        PRECISION=precision(x.dtype),
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
                    "p_y": y[i],
                    "p_q": a[i],
                    "p_u": b[i],
                    "p_bias": some_bias if bias[i] is None else bias[i],
                    "N": w.meta.n,
                    "R": a[i].shape[0],
                    "biased": 0 if bias[i] is None else w.meta.n,
                    "scale": float(scales[i]),
                    "stride_qk": a[i].stride(1),
                    "stride_qr": a[i].stride(0),
                    "stride_ur": b[i].stride(1),
                    "stride_un": b[i].stride(0),
                    "stride_bias": stride(bias[i]),
                }
                for i, w in enumerate(weights)
            ]
        ),
    )
