"""Several projections of one x in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import Matrix, Vector, left, mask, matrix, tile
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import store_tile
from lora_kernels.ops.common.triton.pick import ends, pick, three
from lora_kernels.ops.common.triton.tiles import grouped_tile
from lora_kernels.ops.common.triton_host import Dropout, run, stride
from lora_kernels.ops.packed.triton.tiles import (
    packed_branch_tile,
    packed_own_branch_tile,
    packed_product_tile,
    pick_matrix,
)


class Projection(NamedTuple):
    """One projection's arguments: y, its adapter and bias, N, and N again where it has a bias."""

    y: Any
    q: Matrix
    u: Matrix
    R: Any
    scale: Any
    bias: Vector
    N: Any
    biased: Any


@triton.jit
def _packed_forward_kernel(
    x,
    s,
    mask,
    M,
    K,
    projections,
    ends,
    programs,
    SINGLE_PASS: tl.constexpr,
    BIAS: tl.constexpr,
    tile,
    bases,
):
    """y_i = x·w_i + scale_i·s_i·u_i + bias_i with s_i = keep_i(x)·q_i, for up to three projections.

    Shapes: x[M, K] w_i[K, N_i] q_i[K, R_i] u_i[R_i, N_i] y_i[M, N_i] bias_i[N_i]; s[M, Σ R_i] holds
        the s_i side by side. biased_i is N_i, or 0 where there is no bias_i. Columns of tiles up
        to end_i are projection i's. With TMA x and w_i are descriptors, w_i's boxes [BN, BK].
    4-bit w_i are of one format, and decoded in the main loop.
    Grid: [programs], each walking tiles of all y_i in steps of `programs`; neighbours share x.
    Sums in fp32; where not SINGLE_PASS s is read (R_i <= BR only where it is made).
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    p_0, p_1, p_2 = projections
    DTYPE: tl.constexpr = p_0.y.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    for at in tl.range(
        tl.program_id(0),
        tiles_m * ends[2],
        programs,
        flatten=tile.TMA and not SINGLE_PASS,  # see common/triton/linear.py
        disable_licm=not SINGLE_PASS or BM < 64,
    ):
        pid_m, pid_n = grouped_tile(at, tiles_m, ends[2], tile.GROUP)
        which = (pid_n >= ends[0]).to(tl.int32) + (pid_n >= ends[1]).to(tl.int32)
        m0 = pid_m * BM
        n0 = (pid_n - pick(which, 0, ends[0], ends[1])) * BN
        N = pick(which, p_0.N, p_1.N, p_2.N)
        R = pick(which, p_0.R, p_1.R, p_2.R)
        p_t = s.p + pick(which, 0, p_0.R, p_0.R + p_1.R)
        q = pick_matrix(which, p_0.q, p_1.q, p_2.q, False)
        u = pick_matrix(which, p_0.u, p_1.u, p_2.u, False)
        scale = pick(which, p_0.scale, p_1.scale, p_2.scale)
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        b_s = tl.full([BM, tile.BR], 0.0, tl.float32)  # [BM, BR]
        if BIAS:
            o_n = n0 + tl.arange(0, BN)
            m_bias = o_n < pick(which, p_0.biased, p_1.biased, p_2.biased)
            p_bias = pick(which, p_0.bias.p, p_1.bias.p, p_2.bias.p)
            o_bias = o_n * pick(which, p_0.bias.step, p_1.bias.step, p_2.bias.step)
            b_bias = tl.load(p_bias + o_bias, mask=m_bias, other=0.0)  # [BN]
            b_y += b_bias[None, :].to(tl.float32)
        b_y, b_s = packed_product_tile(
            b_y, b_s, which, x, bases, q, R, mask, m0, n0, M, N, K, SINGLE_PASS, False, tile
        )
        t = Matrix(p_t, s.row, 1)
        if SINGLE_PASS:
            b_y = packed_own_branch_tile(
                b_y, b_s, which, t, u, R, scale, mask, m0, n0, M, N, False, DTYPE, tile
            )
        else:
            b_y = packed_branch_tile(b_y, t, u, R, scale, m0, n0, M, N, DTYPE, tile)
        p_y = pick(which, p_0.y, p_1.y, p_2.y)
        store_tile(b_y, Matrix(p_y, N, 1), Vector(None, 1), m0, n0, M, N, tile)


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
    some_bias = next((t for t in bias if t is not None), None)
    run(
        _packed_forward_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        x=left(x, config),
        s=matrix(s),
        mask=mask(dropout),
        M=m,
        K=k,
        projections=three(
            [
                Projection(
                    y[i],
                    matrix(a[i], transposed=True),
                    matrix(b[i], transposed=True),
                    a[i].shape[0],
                    float(scales[i]),
                    Vector(some_bias if bias[i] is None else bias[i], stride(bias[i])),
                    w.meta.n,
                    0 if bias[i] is None else w.meta.n,
                )
                for i, w in enumerate(weights)
            ]
        ),
        ends=tuple(end),
        programs=programs,
        SINGLE_PASS=single_pass,
        BIAS=some_bias is not None,
        tile=tile(
            config,
            x,
            block_r=block_rank(max(t.shape[0] for t in a)),
            even_k=k % config.block_k == 0,
            hold_x=device.tma and dropout.on and single_pass,
        ),
        bases=three([w.args(config, backward=False) for w in weights]),
    )
