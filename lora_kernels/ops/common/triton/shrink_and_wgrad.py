"""One read of dy for all that is made of it: ds, dB, the bias's gradient, and DoRA's sums."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.rank_wide import split_size
from lora_kernels.ops.common.strategies import WARPGROUP_ROWS, one_read_parts
from lora_kernels.ops.common.triton.arguments import matrix, vector
from lora_kernels.ops.common.triton.pick import ends, pick, pick_given, three
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    add_sums,
    cast,
    dot,
    dot_rank,
    fence_copies,
    first_of,
    scale_tile,
)
from lora_kernels.ops.common.triton_host import precision, run


class Projection(NamedTuple):
    """ds = factor · rank ∘ dy·b, db = factor_b · dyᵀ·s and dbias = Σ_m dy, each contiguous, where
    given; residual, of ds's strides, takes what rounding takes from it."""

    dy: Tensor
    s: Tensor
    b: Tensor
    ds: Tensor | None
    db: Tensor | None
    dbias: Tensor | None
    factor: float
    factor_b: float
    rank: Tensor | None = None
    residual: Tensor | None = None


class Magnitude(NamedTuple):
    """DoRA's m̂ = magnitude / norm, written to `scales`: a factor of b's rows, and of db's. Where
    `kept` is given dmagnitude = Σ_m dy ∘ kept, both [M, N]."""

    magnitude: Tensor
    norm: Tensor
    scales: Tensor
    kept: Tensor | None
    dmagnitude: Tensor | None


class _Projection(NamedTuple):
    """One projection's matrices, and its parts: None where they are not asked for."""

    dy: Any
    dy_row: Any
    dy_col: Any
    s: Any
    s_row: Any
    s_col: Any
    b: Any
    b_row: Any
    b_col: Any
    ds: Any
    db: Any
    dbias: Any
    N: Any
    R: Any


class _Rows(NamedTuple):
    """Factors of b's rows: the diagonal `out`, or m̂, with what DoRA sums beside."""

    out: Any
    out_step: Any
    magnitude: Any
    magnitude_step: Any
    norm: Any
    norm_step: Any
    scales: Any
    kept: Any
    kept_row: Any
    kept_col: Any
    dots: Any


@triton.jit
def _column_sums(b_t):
    """Σ of the rows of b_t in fp32, in two steps: two short chains round less."""
    b_t = tl.reshape(b_t.to(tl.float32), [8, b_t.shape[0] // 8, b_t.shape[1]])
    return tl.sum(tl.sum(b_t, axis=0), axis=0)


@triton.jit
def _load_s(c, o_m, last, o_r):
    """s of rows o_m up to last, transposed: [BR, BM]."""
    o_s = o_m[None, :] * c.s_row + o_r[:, None] * c.s_col
    return tl.load(c.s + o_s, mask=(o_m < last)[None, :] & (o_r < c.R)[:, None], other=0.0)


@triton.jit
def _grad_pass_tile(
    c,
    rows,
    pid_n,
    M,
    per_split,
    EVEN_N: tl.constexpr,
    S_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONES: tl.constexpr,
):
    """A block of one projection's columns, over a part of the rows."""
    dtype = c.dy.dtype.element_ty
    pid_m = tl.program_id(1)
    pid_r = tl.program_id(2)
    first = pid_m * per_split
    last = min(first + per_split, M)
    o_n = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = pid_r * BR + tl.arange(0, BR)
    m_n = o_n < c.N
    m_r = o_r < c.R
    if rows.magnitude is not None:
        b_row = scale_tile(rows.magnitude, rows.magnitude_step, rows.norm, rows.norm_step, o_n, m_n)
        if pid_m + pid_r == 0:
            tl.store(rows.scales + o_n, b_row, mask=m_n)
    if c.ds is not None:
        o_b = o_n[:, None] * c.b_row + o_r[None, :] * c.b_col
        b_b = tl.load(c.b + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        if rows.out is not None:
            b_row = tl.load(rows.out + o_n * rows.out_step, mask=m_n, other=0.0).to(tl.float32)
        if rows.out is not None or rows.magnitude is not None:
            b_b = b_b.to(tl.float32) * b_row[:, None]
        b_b = cast(b_b, dtype)
    b_db = tl.full([BR, BN], 0.0, tl.float32)  # [BR, BN]
    b_dbias = tl.full([ONES, BN], 0.0, tl.float32)  # [ONES, BN]
    b_sums = tl.full([BN], 0.0, tl.float32)  # [BN]
    b_dots = tl.full([BN], 0.0, tl.float32)  # [BN]
    for m0 in range(first, last, BM):
        o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < last
        m_dy = m_m[:, None]
        if not EVEN_N:
            m_dy = m_dy & m_n[None, :]
        o_dy = o_m[:, None] * c.dy_row + o_n[None, :] * c.dy_col
        b_dy = tl.load(c.dy + o_dy, mask=m_dy, other=0.0)  # [BM, BN]
        if c.db is not None and S_FIRST:
            b_s = _load_s(c, o_m, last, o_r)
        fence_copies()
        if c.ds is not None:
            b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
            o_ds = (pid_n.to(tl.int64) * M + o_m[:, None]) * c.R + o_r[None, :]
            tl.store(c.ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
        if c.db is not None:
            if not S_FIRST:
                b_s = _load_s(c, o_m, last, o_r)
                fence_copies()
            b_db = dot_rank(b_s, b_dy, b_db, dtype, PRECISION)
        if rows.kept is None:
            if c.dbias is not None:
                b_dbias = add_sums(b_dbias, b_dy, True, PRECISION)
        else:  # dy is read by lanes anyway
            if c.dbias is not None:
                b_sums += _column_sums(b_dy)
            o_kept = o_m[:, None] * rows.kept_row + o_n[None, :] * rows.kept_col
            b_kept = tl.load(rows.kept + o_kept, mask=m_dy, other=0.0)  # [BM, BN]
            b_dots += _column_sums(b_dy.to(tl.float32) * b_kept.to(tl.float32))
    if c.db is not None:
        o_db = (pid_m.to(tl.int64) * c.N + o_n[None, :]) * c.R + o_r[:, None]
        tl.store(c.db + o_db, b_db, mask=m_n[None, :] & m_r[:, None])
    o_part = pid_m.to(tl.int64) * c.N + o_n
    if c.dbias is not None:
        if pid_r == 0:
            if rows.kept is None:
                tl.store(c.dbias + o_part, first_of(b_dbias, 0), mask=m_n)
            else:
                tl.store(c.dbias + o_part, b_sums, mask=m_n)
    if rows.kept is not None:
        if pid_r == 0:
            tl.store(rows.dots + o_part, b_dots, mask=m_n)


@triton.jit
def _grad_pass_kernel(
    projections,
    rows,
    ends,
    M,
    per_split,
    COUNT: tl.constexpr,
    EVEN_N: tl.constexpr,
    S_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONES: tl.constexpr,
):
    """Partial sums of ds_i = dy_i·(row ∘ b_i), db_i = dy_iᵀ·s_i and dbias_i = Σ_m dy_i, each where
    its pointers are given, for COUNT <= 3 projections; a lone one has `rows`: the diagonal out[N],
    or m̂ that is stored too, and dots = Σ_m dy ∘ kept.

    Shapes: dy_i[M, N_i] s_i[M, R_i] b_i[N_i, R_i] kept[M, N]; ds_i[N_i / BN, M, R_i],
        db_i[split_k, N_i, R_i], dbias_i[split_k, N_i] and dots[split_k, N] in fp32. Blocks of
        columns up to end_i are projection i's.
    Grid: [end_2, parts of the rows, cdiv(max R_i, BR)]. Sums in fp32.
    """
    if COUNT == 1:
        pid_n = tl.program_id(0)
        if rows.magnitude is None:  # with m̂ ptxas would put 64-bit columns on the stack
            pid_n = pid_n.to(tl.int64)
        _grad_pass_tile(
            projections[0], rows, pid_n, M, per_split, EVEN_N, S_FIRST, PRECISION, BM, BN, BR, ONES
        )
    else:
        p_0, p_1, p_2 = projections
        for block in tl.range(tl.program_id(0), ends[2], ends[2], disable_licm=True):  # one round
            i = (block >= ends[0]).to(tl.int32) + (block >= ends[1]).to(tl.int32)
            _grad_pass_tile(
                _Projection(
                    pick(i, p_0.dy, p_1.dy, p_2.dy),
                    pick(i, p_0.dy_row, p_1.dy_row, p_2.dy_row),
                    pick(i, p_0.dy_col, p_1.dy_col, p_2.dy_col),
                    pick(i, p_0.s, p_1.s, p_2.s),
                    pick(i, p_0.s_row, p_1.s_row, p_2.s_row),
                    pick(i, p_0.s_col, p_1.s_col, p_2.s_col),
                    pick(i, p_0.b, p_1.b, p_2.b),
                    pick(i, p_0.b_row, p_1.b_row, p_2.b_row),
                    pick(i, p_0.b_col, p_1.b_col, p_2.b_col),
                    pick_given(i, p_0.ds, p_1.ds, p_2.ds),
                    pick_given(i, p_0.db, p_1.db, p_2.db),
                    pick_given(i, p_0.dbias, p_1.dbias, p_2.dbias),
                    pick(i, p_0.N, p_1.N, p_2.N),
                    pick(i, p_0.R, p_1.R, p_2.R),
                ),
                rows,
                (block - pick(i, 0, ends[0], ends[1])).to(tl.int64),
                M,
                per_split,
                EVEN_N,
                S_FIRST,
                PRECISION,
                BM,
                BN,
                BR,
                ONES,
            )


def _ones_rows(device: Device, br: int) -> int:
    """Rows of ones that sum columns beside a product of br rows: Hopper's own products take 64, and
    all readers of a tile must be of one kind."""
    return WARPGROUP_ROWS if device.tma and br >= WARPGROUP_ROWS else 16


def grad_pass(
    projections: Sequence[Projection], *, out: Tensor | None = None, dora: Magnitude | None = None
) -> None:
    """What up to three projections ask for in one read of each dy, and the sums of its parts: two
    launches. All give the same of ds, db and dbias; a lone one may have the diagonal `out` of b's
    rows, or DoRA's m̂."""
    one, count = projections[0], len(projections)
    dy, m, size = one.dy, one.dy.shape[0], one.dy.element_size()
    widths, ranks = [p.dy.shape[1] for p in projections], [p.b.shape[1] for p in projections]
    br = block_rank(max(ranks))
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    end = ends(widths, bn)
    device = planned_device(dy.device)
    _, split_k = one_read_parts(max(m, 1), max(1, end[-1] * bn), device, bn)
    per_split = split_size(max(m, 1), split_k, bm)
    split_k = ceil(max(m, 1) / per_split)

    def parts(wanted: Tensor | None, *shape: int) -> Tensor | None:
        return None if wanted is None else dy.new_empty(shape, dtype=torch.float32)

    made = [
        _Projection(
            *matrix(p.dy),
            *matrix(p.s),
            *matrix(p.b),
            parts(p.ds, ceil(n / bn), m, r),
            parts(p.db, split_k, n, r),
            parts(p.dbias, split_k, n),
            n,
            r,
        )
        for p, n, r in zip(projections, widths, ranks, strict=True)
    ]
    kept = None if dora is None else dora.kept
    thin = one.ds is not None or one.db is not None
    dots = parts(kept, split_k, widths[0])
    run(
        _grad_pass_kernel,
        (end[-1], split_k, ceil(max(ranks) / br) if thin else 1),
        8 if bn == 256 or (size == 2 and count > 1) else 4,
        # Products and lanes read the same tile of dy with `kept`: see `tiles.in_registers`.
        2 if kept is None else 1,
        # See `wgrad`; and a bias's sums without ds, for which ptxas would spill.
        whole_registers=count > 1
        and (dy.dtype == torch.float16 or (one.ds is None and one.dbias is not None)),
        projections=three(made) if count > 1 else tuple(made),
        rows=_Rows(
            *vector(out),
            *vector(None if dora is None else dora.magnitude),
            *vector(None if dora is None else dora.norm),
            None if dora is None else dora.scales,
            *matrix(kept),
            dots,
        ),
        ends=tuple(end) if count > 1 else None,
        M=m,
        per_split=per_split,
        COUNT=count,
        EVEN_N=all(n % bn == 0 for n in widths),
        # Found by compiling: either order costs the other GPUs a block of a multiprocessor.
        S_FIRST=device.tma and kept is None,
        PRECISION=precision(dy.dtype),
        BM=bm,
        BN=bn,
        BR=br,
        ONES=_ones_rows(device, br),
    )
    sums: list[tuple[Tensor | None, Tensor | None, dict[str, Any]]] = []
    for p, t in zip(projections, made, strict=True):
        sums += [
            (t.ds, p.ds, {"factor": p.factor, "rank": p.rank, "residual": p.residual}),
            (t.db, p.db, {"factor": p.factor_b, "row": None if dora is None else dora.scales}),
            (t.dbias, p.dbias, {}),
        ]
    if dora is not None:
        sums.append((dots, dora.dmagnitude, {}))
    given = ((t, into, how) for t, into, how in sums if t is not None and into is not None)
    splitk_reduce([Sum(t, into, **how) for t, into, how in given])
