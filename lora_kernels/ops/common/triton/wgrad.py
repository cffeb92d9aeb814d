"""dA = dsᵀ·keep(x) and dB = dyᵀ·s: sums over the rows, one pass over x and one over dy."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import RankWideConfig, split_size
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import Matrix, Vector, mask, matrix
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    add_sums,
    cast,
    dot,
    dot_by_rank,
    fence_copies,
    first_of,
    keep_operand,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, precision, run


@triton.jit
def _wgrad_tile(
    x,
    t,
    out,
    p_bias,
    mask,
    M,
    C,
    R,
    pid_c,
    pid_r,
    first,
    last,
    factor,
    DROPOUT: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    p_residual=None,
    RESIDUAL: tl.constexpr = False,
):
    """out[c, r] = factor · Σ_m keep(x)[m, c] · t[m, r] and bias[c] = Σ_m x[m, c], over a part of m.

    One block of C and R; x[M, C] t[M, R], and in p_residual the rounding residual of t, or RESIDUAL
    where that is in t; sums in fp32.
    """
    dtype = x.p.dtype.element_ty
    o_c = pid_c * BC + tl.arange(0, BC)
    o_r = pid_r * BR + tl.arange(0, BR)
    m_c = o_c < C
    m_r = o_r < R
    o_m = first + tl.arange(0, BM)
    p_x_tile = x.p + o_m[None, :].to(tl.int64) * x.row + (o_c % C)[:, None] * x.col
    o_t = o_m[:, None].to(tl.int64) * t.row + (o_r % R)[None, :] * t.col
    p_t_tile = t.p + o_t
    p_residual_tile = p_t_tile if p_residual is None else p_residual + o_t
    b_out = tl.full([BC, BR], 0.0, tl.float32)  # [BC, BR]
    b_bias = tl.full([BC, 16], 0.0, tl.float32)  # [BC, 16]
    for m0 in range(first, last, BM):
        if EVEN_M:
            b_x = tl.load(p_x_tile)  # [BC, BM]
            b_t = tl.load(p_t_tile)  # [BM, BR]
        else:
            m_m = m0 + tl.arange(0, BM) < last
            b_x = tl.load(p_x_tile, mask=m_m[None, :], other=0.0)
            b_t = tl.load(p_t_tile, mask=m_m[:, None], other=0.0)
        p_x_tile += BM * x.row
        p_t_tile += BM * t.row
        fence_copies()
        if p_bias is not None:
            b_bias = add_sums(b_bias, b_x, False, PRECISION)
        if DROPOUT:
            o_rows = m0 + tl.arange(0, BM)
            m_keep = keep_operand(
                mask.seed, o_rows, pid_c * BC, mask.stream, mask.threshold, BM, BC
            )
            b_x = tl.where(m_keep.T, b_x, 0.0)
        if p_residual is not None:
            if EVEN_M:
                b_residual = tl.load(p_residual_tile)
            else:
                b_residual = tl.load(p_residual_tile, mask=m_m[:, None], other=0.0)
            p_residual_tile += BM * t.row
            fence_copies()
            b_out = dot(b_x, b_residual, b_out, PRECISION)
        b_out = dot_by_rank(b_x, b_t, b_out, dtype, PRECISION, RESIDUAL)
        if DROPOUT:
            b_out = waited(b_out)
    o_out = o_c[:, None].to(tl.int64) * out.row + o_r[None, :].to(tl.int64) * out.col
    b_out *= factor
    tl.store(out.p + o_out, cast(b_out, out.p.dtype.element_ty), mask=m_c[:, None] & m_r[None, :])
    if p_bias is not None and pid_r == 0:
        tl.store(p_bias + o_c, cast(first_of(b_bias, 1), p_bias.dtype.element_ty), mask=m_c)


@triton.jit
def _wgrad_kernel(
    x,
    ds,
    p_residual,
    da,
    dy,
    s,
    db,
    dbias,
    mask,
    M,
    K,
    N,
    R,
    per_split,
    factor_b,
    blocks_a,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """da = keep_scale · dsᵀ·keep(x), db = factor_b · dyᵀ·s and dbias = Σ_m dy: one pass over each.

    Shapes: x[M, K] ds[M, R] da[R, K] dy[M, N] s[M, R] db[N, R] dbias[N]; with several parts of m
        the results are fp32 partial sums, a part apart.
    Grid: [blocks of K for da, then of N for db; cdiv(R, BR); split_k]. Sums in fp32.
    """
    pid = tl.program_id(0)
    pid_r = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(2) * per_split
    last = min(first + per_split, M)
    if WANT_A:
        if pid < blocks_a:
            _wgrad_tile(
                x, ds, Matrix(da.p + split * da.step, 1, K), None, mask, M, K, R, pid, pid_r, first,
                last, mask.keep_scale, mask.DROPOUT, EVEN_M, PRECISION, BC, BM, BR, p_residual,
                RESIDUAL,
            )  # fmt: skip
    if WANT_B:
        if pid >= blocks_a:
            p_bias = dbias.p
            if dbias.p is not None:
                p_bias = dbias.p + split * dbias.step
            _wgrad_tile(
                dy, s, Matrix(db.p + split * db.step, R, 1), p_bias, mask, M, N, R, pid - blocks_a,
                pid_r, first, last, factor_b, False, EVEN_M, PRECISION, BC, BM, BR,
            )  # fmt: skip


def wgrad(
    config: RankWideConfig,
    x: Tensor | None,
    ds: Tensor | None,
    dy: Tensor | None,
    s: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    dbias: Tensor | None,
    *,
    factor_b: float,
    dropout: Dropout,
    residual: Tensor | None = None,
    whole: bool = False,
) -> None:
    """da = dsᵀ·keep(x) (scaled), db = factor_b · dyᵀ·s and dbias = Σ_m dy, each where given.
    residual, of ds's strides, is what rounding took from ds, unless ds is `whole`."""
    some = da if da is not None else db
    assert some is not None
    like = x if x is not None else dy
    assert like is not None
    m, dtype = like.shape[0], like.dtype
    r = ds.shape[1] if ds is not None else s.shape[1]  # type: ignore[union-attr]
    k = x.shape[1] if da is not None else 0  # type: ignore[union-attr]
    n = dy.shape[1] if db is not None else 0  # type: ignore[union-attr]
    br = block_rank(r)
    per_split = split_size(m, config.split_k, config.step)
    split_k = max(1, ceil(m / per_split)) if m else 1
    parts_a, parts_b, parts_bias = da, db, dbias
    if split_k > 1:
        fp32 = torch.float32
        parts_a = None if da is None else like.new_empty((split_k, r, k), dtype=fp32)
        parts_b = None if db is None else like.new_empty((split_k, n, r), dtype=fp32)
        parts_bias = None if dbias is None else like.new_empty((split_k, n), dtype=fp32)
    blocks_a, blocks_b = ceil(k / config.block), ceil(n / config.block)
    run(
        _wgrad_kernel,
        (blocks_a + blocks_b, ceil(r / br), split_k),
        config.warps,
        config.stages,
        # Powers of two take a few registers beside the mask's.
        whole_registers=dtype == torch.float16,
        x=matrix(x),
        ds=matrix(ds),
        p_residual=residual,
        da=Vector(parts_a, r * k),
        dy=matrix(dy),
        s=matrix(s),
        db=Vector(parts_b, n * r),
        dbias=Vector(parts_bias, n),
        mask=mask(dropout),
        M=m,
        K=k,
        N=n,
        R=r,
        per_split=per_split,
        factor_b=float(factor_b),
        blocks_a=blocks_a,
        WANT_A=da is not None,
        WANT_B=db is not None,
        RESIDUAL=whole,
        EVEN_M=m % config.step == 0,
        PRECISION=precision(dtype),
        BC=config.block,
        BM=config.step,
        BR=br,
    )
    if split_k > 1:
        made = ((parts_a, da), (parts_b, db), (parts_bias, dbias))
        splitk_reduce([Sum(p, out) for p, out in made if p is not None and out is not None])
