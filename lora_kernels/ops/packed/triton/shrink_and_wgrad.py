"""One read of every dy_i for ds_i, dB_i and dbias_i."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import span_of
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.strategies import one_read_parts
from lora_kernels.ops.common.triton.shrink_and_wgrad import ones_rows
from lora_kernels.ops.common.triton.splitk_reduce import _SUM_BLOCK, _sum
from lora_kernels.ops.common.triton.tiles import (
    add_sums,
    cast,
    dot,
    dot_rank,
    fence_copies,
    first_of,
)
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.packed.triton.groups import ends, numbered, pick


@triton.jit
def _packed_grad_pass_kernel(
    M,
    span,
    p_dy_0, p_s_0, p_b_0, p_ds_0, p_db_0, p_dbias_0, N_0, R_0, stride_dym_0, stride_dyn_0,
    stride_sm_0, stride_bn_0, stride_br_0,
    p_dy_1, p_s_1, p_b_1, p_ds_1, p_db_1, p_dbias_1, N_1, R_1, stride_dym_1, stride_dyn_1,
    stride_sm_1, stride_bn_1, stride_br_1,
    p_dy_2, p_s_2, p_b_2, p_ds_2, p_db_2, p_dbias_2, N_2, R_2, stride_dym_2, stride_dyn_2,
    stride_sm_2, stride_bn_2, stride_br_2,
    end_0,
    end_1,
    end_2,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONES: tl.constexpr,
):  # fmt: skip
    """Partial sums of ds_i = dy_i·b_i, db_i = dy_iᵀ·s_i and dbias_i = Σ_m dy_i, each where its
    pointers are given, for up to three projections.

    Shapes: dy_i[M, N_i] s_i[M, R_i] b_i[N_i, R_i]; ds_i[N_i / BN, M, R_i], db_i[spans, N_i, R_i]
        and dbias_i[spans, N_i] in fp32. Blocks of columns up to end_i are projection i's.
    Grid: [end_2, spans of rows, cdiv(max R_i, BR)]. Sums in fp32.
    """
    dtype = p_dy_0.dtype.element_ty
    pid_m = tl.program_id(1)
    o_r = tl.program_id(2) * BR + tl.arange(0, BR)
    first = pid_m * span
    last = min(first + span, M)
    for block in tl.range(tl.program_id(0), end_2, end_2, disable_licm=True):  # one round
        which = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
        pid_n = block - pick(which, 0, end_0, end_1)
        N = pick(which, N_0, N_1, N_2)
        R = pick(which, R_0, R_1, R_2)
        p_dy = pick(which, p_dy_0, p_dy_1, p_dy_2)
        stride_dym = pick(which, stride_dym_0, stride_dym_1, stride_dym_2)
        stride_dyn = pick(which, stride_dyn_0, stride_dyn_1, stride_dyn_2)
        o_n = pid_n.to(tl.int64) * BN + tl.arange(0, BN)
        m_n = o_n < N
        m_r = o_r < R
        if p_ds_0 is not None:
            stride_bn = pick(which, stride_bn_0, stride_bn_1, stride_bn_2)
            stride_br = pick(which, stride_br_0, stride_br_1, stride_br_2)
            o_b = o_n[:, None] * stride_bn + o_r[None, :] * stride_br
            p_b = pick(which, p_b_0, p_b_1, p_b_2)
            b_b = tl.load(p_b + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
            b_b = cast(b_b, dtype)
            p_ds = pick(which, p_ds_0, p_ds_1, p_ds_2) + pid_n.to(tl.int64) * M * R
        if p_db_0 is not None:
            p_s = pick(which, p_s_0, p_s_1, p_s_2)
            stride_sm = pick(which, stride_sm_0, stride_sm_1, stride_sm_2)
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
            if p_ds_0 is not None:
                b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
                o_ds = o_m[:, None] * R + o_r[None, :]
                tl.store(p_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
            if p_db_0 is not None:
                o_s = o_m[None, :] * stride_sm + o_r[:, None]
                b_s = tl.load(p_s + o_s, mask=m_m[None, :] & m_r[:, None], other=0.0)  # [BR, BM]
                fence_copies()
                b_db = dot_rank(b_s, b_dy, b_db, dtype, PRECISION)
            if p_dbias_0 is not None:
                b_dbias = add_sums(b_dbias, b_dy, True, PRECISION)
        if p_db_0 is not None:
            o_db = (pid_m.to(tl.int64) * N + o_n[None, :]) * R + o_r[:, None]
            p_db = pick(which, p_db_0, p_db_1, p_db_2)
            tl.store(p_db + o_db, b_db, mask=m_n[None, :] & m_r[:, None])
        if p_dbias_0 is not None:
            p_dbias = pick(which, p_dbias_0, p_dbias_1, p_dbias_2)
            if tl.program_id(2) == 0:
                tl.store(p_dbias + pid_m.to(tl.int64) * N + o_n, first_of(b_dbias, 0), mask=m_n)


@triton.jit
def _packed_sum_kernel(
    p_ds_0, p_ds_out_0, ds_size_0, ds_parts_0, scale_0, p_db_0, p_db_out_0, db_size_0, p_dbias_0,
    p_dbias_out_0, dbias_size_0,
    p_ds_1, p_ds_out_1, ds_size_1, ds_parts_1, scale_1, p_db_1, p_db_out_1, db_size_1, p_dbias_1,
    p_dbias_out_1, dbias_size_1,
    p_ds_2, p_ds_out_2, ds_size_2, ds_parts_2, scale_2, p_db_2, p_db_out_2, db_size_2, p_dbias_2,
    p_dbias_out_2, dbias_size_2,
    spans,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ds_i = scale_i · Σ parts, db_i = scale_i · Σ parts and dbias_i = Σ parts, where given.

    Shapes: ds_i[ds_parts_i, ds_size_i], db_i[spans, db_size_i] and dbias_i[spans, dbias_size_i]
        fp32 parts; each result of one part's size and of any type.
    Grid: [blocks of the largest result, projections, 3]. Parts are added in their order, in fp32.
    """
    pid = tl.program_id(0)
    which = tl.program_id(1)
    if p_ds_0 is not None:
        if tl.program_id(2) == 0:
            _sum(
                pick(which, p_ds_0, p_ds_1, p_ds_2),
                pick(which, p_ds_out_0, p_ds_out_1, p_ds_out_2),
                None,
                pick(which, ds_size_0, ds_size_1, ds_size_2),
                pick(which, ds_parts_0, ds_parts_1, ds_parts_2),
                1,
                pick(which, scale_0, scale_1, scale_2),
                1,
                pid,
                BLOCK,
            )
    if p_db_0 is not None:
        if tl.program_id(2) == 1:
            _sum(
                pick(which, p_db_0, p_db_1, p_db_2),
                pick(which, p_db_out_0, p_db_out_1, p_db_out_2),
                None,
                pick(which, db_size_0, db_size_1, db_size_2),
                spans,
                1,
                pick(which, scale_0, scale_1, scale_2),
                1,
                pid,
                BLOCK,
            )
    if p_dbias_0 is not None:
        if tl.program_id(2) == 2:
            _sum(
                pick(which, p_dbias_0, p_dbias_1, p_dbias_2),
                pick(which, p_dbias_out_0, p_dbias_out_1, p_dbias_out_2),
                None,
                pick(which, dbias_size_0, dbias_size_1, dbias_size_2),
                spans,
                1,
                1.0,
                1,
                pid,
                BLOCK,
            )


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
    _, spans = one_read_parts(max(m, 1), max(1, end[-1] * bn), device, bn)
    span = span_of(max(m, 1), spans, bm)
    spans = ceil(max(m, 1) / span)
    parts: list[dict[str, Tensor | None]] = [
        {
            "p_ds": None if ds is None else t.new_empty((ceil(n / bn), m, r), dtype=torch.float32),
            "p_db": None if db is None else t.new_empty((spans, n, r), dtype=torch.float32),
            "p_dbias": None if dbias is None else t.new_empty((spans, n), dtype=torch.float32),
        }
        for t, n, r in zip(dy, widths, ranks, strict=True)
    ]
    run(
        _packed_grad_pass_kernel,
        (end[-1], spans, ceil(max(ranks) / br)),
        8 if size == 2 else 4,
        2,
        whole_registers=dy[0].dtype == torch.float16,  # see `outer`
        M=m,
        span=span,
        end_0=end[0],
        end_1=end[1],
        end_2=end[2],
        EVEN_N=all(n % bn == 0 for n in widths),
        PRECISION=precision(dy[0].dtype),
        BM=bm,
        BN=bn,
        BR=br,
        ONES=ones_rows(device, br),
        **numbered(
            [
                {
                    "p_dy": t,
                    "p_s": s[i],
                    "p_b": b[i],
                    "N": widths[i],
                    "R": ranks[i],
                    "stride_dym": t.stride(0),
                    "stride_dyn": t.stride(1),
                    "stride_sm": s[i].stride(0),
                    "stride_bn": b[i].stride(0),
                    "stride_br": b[i].stride(1),
                    **parts[i],
                }
                for i, t in enumerate(dy)
            ]
        ),
    )
    sums: list[dict[str, object]] = [
        {
            **parts[i],
            "p_ds_out": None if ds is None else ds[i],
            "ds_size": m * ranks[i],
            "ds_parts": ceil(n / bn),
            "scale": float(scales[i]),
            "p_db_out": None if db is None else db[i],
            "db_size": n * ranks[i],
            "p_dbias_out": None if dbias is None else dbias[i],
            "dbias_size": n,
        }
        for i, n in enumerate(widths)
    ]
    longest = max(m if ds is not None else 0, max(widths) if db is not None else 0)
    run(
        _packed_sum_kernel,
        (ceil(longest * max(ranks) / _SUM_BLOCK), len(dy), 3),
        4,
        2,
        spans=spans,
        BLOCK=_SUM_BLOCK,
        **numbered(sums),
    )
