"""One read of every dy_i for ds_i, dB_i and dbias_i."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import split_size
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.strategies import one_read_parts
from lora_kernels.ops.common.triton.arguments import Matrix, matrix
from lora_kernels.ops.common.triton.shrink_and_wgrad import ones_rows
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import (
    add_sums,
    cast,
    dot,
    dot_rank,
    fence_copies,
    first_of,
)
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.packed.triton.groups import ends, pick, three


class Projection(NamedTuple):
    """One projection's arguments, and its parts: None where they are not asked for."""

    dy: Matrix
    s: Matrix
    b: Matrix
    ds: Any
    db: Any
    dbias: Any
    N: Any
    R: Any


@triton.jit
def _packed_grad_pass_kernel(
    M,
    per_split,
    projections,
    ends,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONES: tl.constexpr,
):
    """Partial sums of ds_i = dy_i·b_i, db_i = dy_iᵀ·s_i and dbias_i = Σ_m dy_i, each where its
    pointers are given, for up to three projections.

    Shapes: dy_i[M, N_i] s_i[M, R_i] b_i[N_i, R_i]; ds_i[N_i / BN, M, R_i], db_i[split_k, N_i, R_i]
        and dbias_i[split_k, N_i] in fp32. Blocks of columns up to end_i are projection i's.
    Grid: [end_2, parts of the rows, cdiv(max R_i, BR)]. Sums in fp32.
    """
    p_0, p_1, p_2 = projections
    dtype = p_0.dy.p.dtype.element_ty
    pid_m = tl.program_id(1)
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    first = pid_m * per_split
    last = min(first + per_split, M)
    for block in tl.range(tl.program_id(0), ends[2], ends[2], disable_licm=True):  # one round
        which = (block >= ends[0]).to(tl.int32) + (block >= ends[1]).to(tl.int32)
        pid_n = block - pick(which, 0, ends[0], ends[1])
        N = pick(which, p_0.N, p_1.N, p_2.N)
        R = pick(which, p_0.R, p_1.R, p_2.R)
        p_dy = pick(which, p_0.dy.p, p_1.dy.p, p_2.dy.p)
        stride_dym = pick(which, p_0.dy.row, p_1.dy.row, p_2.dy.row)
        stride_dyn = pick(which, p_0.dy.col, p_1.dy.col, p_2.dy.col)
        o_n = pid_n.to(tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_r = o_r < R
        if p_0.ds is not None:
            stride_bn = pick(which, p_0.b.row, p_1.b.row, p_2.b.row)
            stride_br = pick(which, p_0.b.col, p_1.b.col, p_2.b.col)
            o_b = o_n[:, None] * stride_bn + o_r[None, :] * stride_br
            p_b = pick(which, p_0.b.p, p_1.b.p, p_2.b.p)
            b_b = tl.load(p_b + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
            b_b = cast(b_b, dtype)
            p_ds = pick(which, p_0.ds, p_1.ds, p_2.ds) + pid_n.to(tl.int64) * M * R
        if p_0.db is not None:
            p_s = pick(which, p_0.s.p, p_1.s.p, p_2.s.p)
            stride_sm = pick(which, p_0.s.row, p_1.s.row, p_2.s.row)
            b_db = tl.full([BR, BN], 0.0, tl.float32)  # [BR, BN]
        b_dbias = tl.full([ONES, BN], 0.0, tl.float32)  # [ONES, BN]
        for m0 in range(first, last, BM):
            o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
            m_m = o_m < last
            o_dy = o_m[:, None] * stride_dym + o_n[None, :] * stride_dyn
            if EVEN_N:
                b_dy = tl.load(p_dy + o_dy, mask=m_m[:, None], other=0.0)  # [BM, BN]
            else:
                b_dy = tl.load(p_dy + o_dy, mask=m_m[:, None] & m_n[None, :], other=0.0)
            fence_copies()
            if p_0.ds is not None:
                b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
                o_ds = o_m[:, None] * R + o_r[None, :]
                tl.store(p_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
            if p_0.db is not None:
                o_s = o_m[None, :] * stride_sm + o_r[:, None]
                b_s = tl.load(p_s + o_s, mask=m_m[None, :] & m_r[:, None], other=0.0)  # [BR, BM]
                fence_copies()
                b_db = dot_rank(b_s, b_dy, b_db, dtype, PRECISION)
            if p_0.dbias is not None:
                b_dbias = add_sums(b_dbias, b_dy, True, PRECISION)
        if p_0.db is not None:
            o_db = (pid_m.to(tl.int64) * N + o_n[None, :]) * R + o_r[:, None]
            p_db = pick(which, p_0.db, p_1.db, p_2.db)
            tl.store(p_db + o_db, b_db, mask=m_n[None, :] & m_r[:, None])
        if p_0.dbias is not None:
            p_dbias = pick(which, p_0.dbias, p_1.dbias, p_2.dbias)
            if tl.program_id(2) == 0:
                tl.store(p_dbias + pid_m.to(tl.int64) * N + o_n, first_of(b_dbias, 0), mask=m_n)


def packed_grad_pass(
    dy: Sequence[Tensor],
    s: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    ds: Sequence[Tensor] | None,
    db: Sequence[Tensor] | None,
    dbias: Sequence[Tensor] | None,
) -> None:
    """ds_i = scale_i · dy_i·b_i, db_i = scale_i · dy_iᵀ·s_i and dbias_i, where given: two launches.

    ds_i, db_i and dbias_i are contiguous; the columns of s_i are neighbours in memory.
    """
    m, size = dy[0].shape[0], dy[0].element_size()
    widths, ranks = [t.shape[1] for t in dy], [t.shape[1] for t in b]
    br = block_rank(max(ranks))
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    end = ends(widths, bn)
    device = planned_device(dy[0].device)
    _, split_k = one_read_parts(max(m, 1), max(1, end[-1] * bn), device, bn)
    per_split = split_size(max(m, 1), split_k, bm)
    split_k = ceil(max(m, 1) / per_split)
    fp32 = torch.float32
    parts = [
        Projection(
            matrix(t),
            matrix(s[i]),
            matrix(b[i]),
            None if ds is None else t.new_empty((ceil(n / bn), m, r), dtype=fp32),
            None if db is None else t.new_empty((split_k, n, r), dtype=fp32),
            None if dbias is None else t.new_empty((split_k, n), dtype=fp32),
            n,
            r,
        )
        for i, (t, n, r) in enumerate(zip(dy, widths, ranks, strict=True))
    ]
    run(
        _packed_grad_pass_kernel,
        (end[-1], split_k, ceil(max(ranks) / br)),
        8 if size == 2 else 4,
        2,
        whole_registers=dy[0].dtype == torch.float16,  # see `wgrad`
        M=m,
        per_split=per_split,
        projections=three(parts),
        ends=tuple(end),
        EVEN_N=all(n % bn == 0 for n in widths),
        PRECISION=precision(dy[0].dtype),
        BM=bm,
        BN=bn,
        BR=br,
        ONES=ones_rows(device, br),
    )

    sums = []
    for i, p in enumerate(parts):
        for made, out, factor in (
            (p.ds, ds, scales[i]),
            (p.db, db, scales[i]),
            (p.dbias, dbias, 1.0),
        ):
            if out is not None:
                sums.append(Sum(made, out[i], factor))
    splitk_reduce(sums)
