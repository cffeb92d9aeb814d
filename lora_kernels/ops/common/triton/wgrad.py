"""dA = dsᵀ·keep(x) and dB = dyᵀ·s: sums over the rows, one pass over x and one over dy."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.rank_wide import split_size, wgrad_config
from lora_kernels.ops.common.triton.arguments import mask, matrix
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    add_sums,
    cast,
    dot,
    dot_by_rank,
    fence_copies,
    first_of,
    keep_operand,
    load_step,
    waited,
)
from lora_kernels.ops.common.triton_host import Dropout, precision, run


class Gradient(NamedTuple):
    """da [R, K] = keep_scale · dsᵀ·keep(x), contiguous, with the mask of `stream`; residual, of
    ds's strides, is what rounding took from it."""

    ds: Tensor
    da: Tensor
    stream: int
    residual: Tensor | None = None


class Beside(NamedTuple):
    """db [N, R] = factor · dyᵀ·s and, where given, dbias = Σ_m dy."""

    dy: Tensor
    s: Tensor
    db: Tensor
    dbias: Tensor | None
    factor: float


class _Gradient(NamedTuple):
    """out[c, r] = factor · Σ_m x[m, c]·t[m, r] as the kernel takes it; `split`: from one part of M
    to the next."""

    t: Any
    t_row: Any
    t_col: Any
    residual: Any
    out: Any
    out_row: Any
    out_col: Any
    split: Any
    R: Any
    factor: Any
    stream: Any


@triton.jit
def _rank_offsets(g, o_m, pid_r, WRAP: tl.constexpr, BR: tl.constexpr):
    """Offsets of t's tile [BM, BR]; with WRAP a column past the last is one again."""
    o_r = pid_r * BR + tl.arange(0, BR)
    if WRAP:
        o_r = o_r % g.R
    return o_m[:, None].to(tl.int64) * g.t_row + o_r[None, :] * g.t_col


@triton.jit
def _load_rank(g, o_m, last, pid_r, EVEN_R: tl.constexpr, EVEN_M: tl.constexpr, BR: tl.constexpr):
    """t's tile [BM, BR], 0 from row `last` on."""
    p_t = g.t + _rank_offsets(g, o_m, pid_r, EVEN_R, BR)
    m_t = (o_m < last)[:, None]
    if not EVEN_R:
        m_t = m_t & (pid_r * BR + tl.arange(0, BR) < g.R)[None, :]
    return load_step(p_t, m_t, EVEN_M and EVEN_R)


@triton.jit
def _wgrad_step(
    b_out,
    b_x,
    b_t,
    p_residual,
    g,
    mask,
    m0,
    last,
    c0,
    DROPOUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    """b_out + keep(b_x)·b_t of one step of M; b_x[BC, BM] b_t[BM, BR], and p_residual points to the
    residual's tile where g has one."""
    dtype = b_x.dtype
    o_m = m0 + tl.arange(0, BM)
    if DROPOUT:
        m_keep = keep_operand(mask.seed, o_m, c0, g.stream, mask.threshold, BM, BC)
        b_x = tl.where(m_keep.T, b_x, 0.0)
    if g.residual is not None:
        b_residual = load_step(p_residual, (o_m < last)[:, None], EVEN_M)
        fence_copies()
        b_out = dot(b_x, b_residual, b_out, PRECISION)
    b_out = dot_by_rank(b_x, b_t, b_out, dtype, PRECISION, RESIDUAL)
    if DROPOUT:
        b_out = waited(b_out)
    return b_out


@triton.jit
def _store(b_out, g, o_c, C, pid_r, split, BR: tl.constexpr):
    o_r = pid_r * BR + tl.arange(0, BR)
    o_out = o_c[:, None].to(tl.int64) * g.out_row + o_r[None, :].to(tl.int64) * g.out_col
    m_out = (o_c < C)[:, None] & (o_r < g.R)[None, :]
    b_out = cast(b_out * g.factor, g.out.dtype.element_ty)
    tl.store(g.out + split * g.split + o_out, b_out, mask=m_out)


@triton.jit
def _wgrad_tile(
    x,
    gradients,
    p_bias,
    mask,
    M,
    C,
    pid_c,
    first,
    last,
    COUNT: tl.constexpr,
    EVEN_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """out_i[c, r] = factor_i · Σ_m keep_i(x)[m, c] · t_i[m, r] and bias[c] = Σ_m x[m, c], over a
    part of m.

    One block of C and R; x[M, C] t_i[M, R_i], and in residual_i the rounding residual of t_i, or
    RESIDUAL where that is in t_i; sums in fp32.
    """
    pid_r = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    o_c = pid_c * BC + tl.arange(0, BC)
    p_x = x.p + (o_c % C)[:, None] * x.col
    if COUNT == 1:  # of three the registers would not hold the pointers
        o_m = first + tl.arange(0, BM)
        p_x += o_m[None, :].to(tl.int64) * x.row
        o_t = _rank_offsets(gradients[0], o_m, pid_r, True, BR)
        p_t = gradients[0].t + o_t
        p_residual = p_t
        if gradients[0].residual is not None:
            p_residual = gradients[0].residual + o_t
    b_0 = tl.full([BC, BR], 0.0, tl.float32)  # [BC, BR]
    b_1 = tl.full([BC, BR], 0.0, tl.float32)
    b_2 = tl.full([BC, BR], 0.0, tl.float32)
    b_bias = tl.full([BC, 16], 0.0, tl.float32)  # [BC, 16]
    for m0 in range(first, last, BM):
        o_m = m0 + tl.arange(0, BM)
        if COUNT == 1:
            b_x = load_step(p_x, (o_m < last)[None, :], EVEN_M)  # [BC, BM]
            b_t = load_step(p_t, (o_m < last)[:, None], EVEN_M)  # [BM, BR]
            fence_copies()
            if p_bias is not None:
                b_bias = add_sums(b_bias, b_x, False, PRECISION)
            b_0 = _wgrad_step(
                b_0, b_x, b_t, p_residual, gradients[0], mask, m0, last, pid_c * BC, DROPOUT,
                RESIDUAL, EVEN_M, PRECISION, BC, BM,
            )  # fmt: skip
            p_x += BM * x.row
            p_t += BM * gradients[0].t_row
            p_residual += BM * gradients[0].t_row
        else:
            o_x = o_m[None, :].to(tl.int64) * x.row
            b_x = load_step(p_x + o_x, (o_m < last)[None, :], EVEN_M)
            b_t = _load_rank(gradients[0], o_m, last, pid_r, EVEN_R, EVEN_M, BR)
            fence_copies()
            b_0 = _wgrad_step(
                b_0, b_x, b_t, None, gradients[0], mask, m0, last, pid_c * BC, DROPOUT, RESIDUAL,
                EVEN_M, PRECISION, BC, BM,
            )  # fmt: skip
            b_t = _load_rank(gradients[1], o_m, last, pid_r, EVEN_R, EVEN_M, BR)
            fence_copies()
            b_1 = _wgrad_step(
                b_1, b_x, b_t, None, gradients[1], mask, m0, last, pid_c * BC, DROPOUT, RESIDUAL,
                EVEN_M, PRECISION, BC, BM,
            )  # fmt: skip
            if COUNT > 2:
                b_t = _load_rank(gradients[2], o_m, last, pid_r, EVEN_R, EVEN_M, BR)
                fence_copies()
                b_2 = _wgrad_step(
                    b_2, b_x, b_t, None, gradients[2], mask, m0, last, pid_c * BC, DROPOUT,
                    RESIDUAL, EVEN_M, PRECISION, BC, BM,
                )  # fmt: skip
    _store(b_0, gradients[0], o_c, C, pid_r, split, BR)
    if COUNT > 1:
        _store(b_1, gradients[1], o_c, C, pid_r, split, BR)
    if COUNT > 2:
        _store(b_2, gradients[2], o_c, C, pid_r, split, BR)
    if p_bias is not None and pid_r == 0:
        b_first = cast(first_of(b_bias, 1), p_bias.dtype.element_ty)  # [BC]
        tl.store(p_bias + split * C + o_c, b_first, mask=o_c < C)


@triton.jit
def _wgrad_kernel(
    x,
    a,
    dy,
    b,
    p_dbias,
    mask,
    M,
    K,
    N,
    per_split,
    blocks_a,
    COUNT: tl.constexpr,
    EVEN_R: tl.constexpr,
    WANT_B: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """da_i = keep_scale · ds_iᵀ·keep_i(x) for COUNT <= 3 projections, db = factor · dyᵀ·s and
    dbias = Σ_m dy: one pass over x and one over dy.

    Shapes: x[M, K] ds_i[M, R_i] da_i[R_i, K] dy[M, N] s[M, R] db[N, R] dbias[N]; with several parts
        of m the results are fp32 partial sums, a part apart.
    Grid: [blocks of K for da, then of N for db; cdiv(max R_i, BR); split_k]. Sums in fp32.
    """
    pid = tl.program_id(0)
    first = tl.program_id(2) * per_split
    last = min(first + per_split, M)
    if COUNT > 0:
        if pid < blocks_a:
            _wgrad_tile(
                x, a, None, mask, M, K, pid, first, last, COUNT, EVEN_R, mask.DROPOUT, RESIDUAL,
                EVEN_M, PRECISION, BC, BM, BR,
            )  # fmt: skip
    if WANT_B:
        if pid >= blocks_a:
            _wgrad_tile(
                dy, b, p_dbias, mask, M, N, pid - blocks_a, first, last, 1, True, False, False,
                EVEN_M, PRECISION, BC, BM, BR,
            )  # fmt: skip


def wgrad(
    x: Tensor,
    gradients: Sequence[Gradient],
    dropout: Dropout,
    beside: Beside | None = None,
    *,
    whole: bool = False,
) -> None:
    """The da of up to three projections of x, and in the same launch what is made of dy, where
    given. `whole`: what rounding takes from ds is in it."""
    dy, s, db, dbias, factor_b = beside or (None, None, None, None, 1.0)
    m, k = x.shape
    count, dtype = len(gradients), x.dtype
    n = 0 if dy is None else dy.shape[1]
    r = max([g.ds.shape[1] for g in gradients] + ([] if s is None else [s.shape[1]]))
    br = block_rank(r)
    columns = (k if count else 0) + n
    config = wgrad_config(m, columns, planned_device(x.device), br, x.element_size())
    if count > 1:
        config = config.of_several(br)
    per_split = split_size(m, config.split_k, config.step)
    split_k = max(1, ceil(m / per_split)) if m else 1

    def parts(out: Tensor | None) -> Tensor | None:
        if out is None or split_k == 1:
            return out
        return out.new_empty((split_k, *out.shape), dtype=torch.float32)

    outs = [*(g.da for g in gradients), db, dbias]
    targets = [parts(t) for t in outs]
    blocks_a = ceil(k / config.block) if count else 0
    run(
        _wgrad_kernel,
        (blocks_a + ceil(n / config.block), ceil(r / br), split_k),
        config.warps,
        config.stages,
        # Powers of two take a few registers beside the mask's.
        whole_registers=dtype == torch.float16 and count < 2,
        x=matrix(x),
        a=tuple(
            _Gradient(
                *matrix(g.ds),
                g.residual,
                targets[i],
                1,
                k,
                g.da.numel(),
                g.ds.shape[1],
                dropout.keep_scale,
                g.stream,
            )
            for i, g in enumerate(gradients)
        ),
        dy=matrix(dy),
        b=(_Gradient(*matrix(s), None, targets[-2], r, 1, n * r, r, float(factor_b), 0),),
        p_dbias=targets[-1],
        mask=mask(dropout),
        M=m,
        K=k,
        N=n,
        per_split=per_split,
        blocks_a=blocks_a,
        COUNT=count,
        # A lone layer's few ranks are loaded again, three projections' are masked.
        EVEN_R=count < 2 or all(g.ds.shape[1] % br == 0 for g in gradients),
        WANT_B=db is not None,
        RESIDUAL=whole,
        EVEN_M=m % config.step == 0,
        PRECISION=precision(dtype),
        BC=config.block,
        BM=config.step,
        BR=br,
    )
    if split_k > 1:
        pairs = zip(targets, outs, strict=True)
        splitk_reduce([Sum(p, out) for p, out in pairs if p is not None and out is not None])
