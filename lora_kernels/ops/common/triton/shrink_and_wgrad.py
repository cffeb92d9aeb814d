"""One read of dy for both of its thin products, ds and dB."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, split_size
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.strategies import WARPGROUP_ROWS, one_read_parts
from lora_kernels.ops.common.triton.arguments import matrix, vector
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


@triton.jit
def _grad_pass_kernel(
    dy,
    s,
    b,
    p_ds,
    p_db,
    p_dbias,
    out,
    M,
    N,
    R,
    per_split,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    ONES: tl.constexpr,
):
    """Partial sums of ds = dy·(out ∘ b), db = dyᵀ·s and dbias = Σ_m dy.

    Shapes: dy[M, N] s[M, R] b[N, R] out[N]; ds[N / BN, M, R], db[split_k, N, R] and
        dbias[split_k, N] in fp32. R <= BR.
    Grid: [cdiv(N, BN), parts of the rows]. Sums in fp32.
    """
    dtype = dy.p.dtype.element_ty
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    o_n = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    m_r = o_r < R
    first = pid_m * per_split
    last = min(first + per_split, M)
    o_b = o_n[:, None] * b.row + o_r[None, :] * b.col
    b_b = tl.load(b.p + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
    if out.p is not None:
        b_out = tl.load(out.p + o_n * out.step, mask=m_n, other=0.0)  # [BN]
        b_b = b_b.to(tl.float32) * b_out[:, None].to(tl.float32)
    b_b = cast(b_b, dtype)
    b_db = tl.full([BR, BN], 0.0, tl.float32)  # [BR, BN]
    b_dbias = tl.full([ONES, BN], 0.0, tl.float32)  # [ONES, BN]
    for m0 in range(first, last, BM):
        o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < last
        o_dy = o_m[:, None] * dy.row + o_n[None, :] * dy.col
        if EVEN_N:
            b_dy = tl.load(dy.p + o_dy, mask=m_m[:, None], other=0.0)  # [BM, BN]
        else:
            b_dy = tl.load(dy.p + o_dy, mask=m_m[:, None] & m_n[None, :], other=0.0)
        o_s = o_m[None, :] * s.row + o_r[:, None] * s.col
        b_s = tl.load(s.p + o_s, mask=m_m[None, :] & m_r[:, None], other=0.0)  # [BR, BM]
        fence_copies()
        b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
        o_ds = (pid_n.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
        tl.store(p_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
        b_db = dot_rank(b_s, b_dy, b_db, dtype, PRECISION)
        if p_dbias is not None:
            b_dbias = add_sums(b_dbias, b_dy, True, PRECISION)
    o_db = (pid_m.to(tl.int64) * N + o_n[None, :]) * R + o_r[:, None]
    tl.store(p_db + o_db, b_db, mask=m_n[None, :] & m_r[:, None])
    if p_dbias is not None:
        tl.store(p_dbias + pid_m.to(tl.int64) * N + o_n, first_of(b_dbias, 0), mask=m_n)


def ones_rows(device: Device, br: int) -> int:
    """Rows of ones that sum columns beside a product of br rows: Hopper's own products take 64, and
    all readers of a tile must be of one kind."""
    return WARPGROUP_ROWS if device.tma and br >= WARPGROUP_ROWS else 16


def grad_pass(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    ds: Tensor,
    db: Tensor,
    dbias: Tensor | None,
    *,
    device: Device,
    scale: float,
    factor_b: float,
    rank: Tensor | None,
    col: Tensor | None,
) -> None:
    """ds = scale · rank ∘ (dy·(col ∘ b)), db = factor_b · dyᵀ·s and dbias: one read of dy."""
    m, n = dy.shape
    r = b.shape[1]
    br = block_rank(r)
    size = dy.element_size()
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    parts_n, parts_m = one_read_parts(max(m, 1), n, device, bn)
    per_split = split_size(max(m, 1), parts_m, bm)
    parts_m = ceil(max(m, 1) / per_split)
    fp32 = torch.float32
    parts_ds = dy.new_empty((parts_n, m, r), dtype=fp32)
    parts_db = dy.new_empty((parts_m, n, r), dtype=fp32)
    parts_bias = None if dbias is None else dy.new_empty((parts_m, n), dtype=fp32)
    run(
        _grad_pass_kernel,
        (parts_n, parts_m),
        8 if bn == 256 else 4,
        2,
        dy=matrix(dy),
        s=matrix(s),
        b=matrix(b),
        p_ds=parts_ds,
        p_db=parts_db,
        p_dbias=parts_bias,
        out=vector(col),
        M=m,
        N=n,
        R=r,
        per_split=per_split,
        EVEN_N=n % bn == 0,
        PRECISION=precision(dy.dtype),
        BM=bm,
        BN=bn,
        BR=br,
        ONES=ones_rows(device, br),
    )
    sums = [Sum(parts_ds, ds, scale, rank), Sum(parts_db, db, factor_b)]
    if dbias is not None and parts_bias is not None:
        sums.append(Sum(parts_bias, dbias))
    splitk_reduce(sums)
