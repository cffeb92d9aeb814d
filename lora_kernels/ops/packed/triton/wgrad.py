"""Every dA_i of several projections in one pass over x."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import wgrad_config
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import mask, matrix
from lora_kernels.ops.common.triton.tiles import (
    cast,
    dot_by_rank,
    fence_copies,
    keep_operand,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, precision, run
from lora_kernels.ops.packed.triton.groups import three


@triton.jit
def _grad_a_step(
    b_da,
    b_x,
    p_ds,
    mask,
    which,
    m0,
    M,
    R,
    r0,
    c0,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """b_da + keep(b_x)·ds of one step of M; b_x[BC, BM]."""
    o_m = m0 + tl.arange(0, BM)
    o_r = r0 + tl.arange(0, BR)
    o_ds = o_m[:, None].to(tl.int64) * R + o_r[None, :]
    b_ds = tl.load(p_ds + o_ds, mask=(o_m < M)[:, None] & (o_r < R)[None, :], other=0.0)
    DTYPE: tl.constexpr = b_x.dtype
    if mask.DROPOUT:
        stream = mask.stream + which
        m_keep = keep_operand(mask.seed, o_m, c0, stream, mask.threshold, BM, BC)
        b_x = tl.where(m_keep.T, b_x, 0.0)
    fence_copies()
    b_da = dot_by_rank(b_x, b_ds, b_da, DTYPE, PRECISION)
    if mask.DROPOUT:
        b_da = waited(b_da)
    return b_da


@triton.jit
def _store_grad_a(b_da, p_da, o_c, K, R, r0, keep_scale, BR: tl.constexpr):
    o_r = r0 + tl.arange(0, BR)
    o_da = o_r[None, :].to(tl.int64) * K + o_c[:, None]
    m_da = (o_c < K)[:, None] & (o_r < R)[None, :]
    tl.store(p_da + o_da, cast(b_da * keep_scale, p_da.dtype.element_ty), mask=m_da)


@triton.jit
def _packed_grad_a_kernel(
    x,
    p_ds,
    p_das,
    ranks,
    mask,
    M,
    K,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """da_i = keep_scale · ds_iᵀ·keep_i(x) for up to three projections; those not asked are None.

    Shapes: x[M, K] da_i[R_i, K]; the ds_i[M, R_i] stand one after the other in ds.
    Grid: [cdiv(K, BC), cdiv(max R_i, BR)]. Sums in fp32.
    """
    c0 = tl.program_id(0) * BC
    r0 = tl.program_id(1) * BR
    o_c = c0 + tl.arange(0, BC)
    p_x = x.p + (o_c % K)[:, None].to(tl.int64) * x.col
    p_ds_1 = p_ds + tl.cast(M, tl.int64) * ranks[0]
    p_ds_2 = p_ds_1 + tl.cast(M, tl.int64) * ranks[1]
    b_0 = tl.full([BC, BR], 0.0, tl.float32)  # [BC, BR]
    b_1 = tl.full([BC, BR], 0.0, tl.float32)
    b_2 = tl.full([BC, BR], 0.0, tl.float32)
    for m0 in range(0, M, BM):
        o_m = m0 + tl.arange(0, BM)
        o_x = o_m[None, :].to(tl.int64) * x.row
        b_x = tl.load(p_x + o_x, mask=(o_m < M)[None, :], other=0.0)  # [BC, BM]
        if p_das[0] is not None:
            b_0 = _grad_a_step(
                b_0, b_x, p_ds, mask, 0, m0, M, ranks[0], r0, c0, PRECISION, BC, BM, BR
            )
        if p_das[1] is not None:
            b_1 = _grad_a_step(
                b_1, b_x, p_ds_1, mask, 1, m0, M, ranks[1], r0, c0, PRECISION, BC, BM, BR
            )
        if p_das[2] is not None:
            b_2 = _grad_a_step(
                b_2, b_x, p_ds_2, mask, 2, m0, M, ranks[2], r0, c0, PRECISION, BC, BM, BR
            )
    if p_das[0] is not None:
        _store_grad_a(b_0, p_das[0], o_c, K, ranks[0], r0, mask.keep_scale, BR)
    if p_das[1] is not None:
        _store_grad_a(b_1, p_das[1], o_c, K, ranks[1], r0, mask.keep_scale, BR)
    if p_das[2] is not None:
        _store_grad_a(b_2, p_das[2], o_c, K, ranks[2], r0, mask.keep_scale, BR)


def grad_a(
    x: Tensor, ds: Tensor, a: Sequence[Tensor], da: Sequence[Tensor | None], dropout: Dropout
) -> None:
    """Every da_i that is asked, in one pass over x."""
    m, k = x.shape
    r = max(t.shape[0] for t in a)
    br = block_rank(r)
    config = wgrad_config(m, k, planned_device(x.device), br, x.element_size())
    run(
        _packed_grad_a_kernel,
        (ceil(k / config.block), ceil(r / br)),
        8 if br > 32 and config.block == 64 else config.warps,
        min(config.stages, 3),
        x=matrix(x),
        p_ds=ds,
        p_das=(*da, *[None] * (3 - len(da))),
        ranks=three([t.shape[0] for t in a], 0),
        mask=mask(dropout),
        M=m,
        K=k,
        PRECISION=precision(x.dtype),
        BC=config.block,
        BM=config.step,
        BR=br,
    )
