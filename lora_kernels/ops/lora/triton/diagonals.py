"""The gradients of rank_diag and out_diag, and the dB that depends on them."""

from __future__ import annotations

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import next_power_of_2
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import cast
from lora_kernels.ops.common.triton_host import run, stride


@triton.jit
def _diagonals_kernel(
    p_g,
    p_b,
    p_rank,
    p_col,
    p_db,
    p_drank,
    p_dcol,
    N,
    R,
    scale,
    stride_bn,
    stride_br,
    stride_rank,
    stride_col,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """From g = dyᵀ·s: db = scale · col ∘ g ∘ rank, drank = scale · Σ_n col ∘ b ∘ g in parts, and
    dcol = scale · Σ_r rank ∘ b ∘ g.

    Shapes: g[N, R] fp32, b[N, R] rank[R] col[N]; db[N, R] in b's type, drank[N / BN, R] and dcol[N]
        of any type. R <= BR. Grid: [cdiv(N, BN)]. Sums in fp32.
    """
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = tl.arange(0, BR)
    m_n = o_n < N
    m_r = o_r < R
    m_nr = m_n[:, None] & m_r[None, :]
    b_g = tl.load(p_g + o_n[:, None] * R + o_r[None, :], mask=m_nr, other=0.0) * scale  # [BN, BR]
    o_b = o_n[:, None] * stride_bn + o_r[None, :] * stride_br
    b_bg = tl.load(p_b + o_b, mask=m_nr, other=0.0).to(tl.float32) * b_g  # [BN, BR]
    if p_rank is not None:
        b_rank = tl.load(p_rank + o_r * stride_rank, mask=m_r, other=0.0).to(tl.float32)  # [BR]
        b_g *= b_rank[None, :]
        b_col_terms = b_bg * b_rank[None, :]
    else:
        b_col_terms = b_bg
    if p_col is not None:
        b_col = tl.load(p_col + o_n * stride_col, mask=m_n, other=0.0).to(tl.float32)  # [BN]
        b_g *= b_col[:, None]
        b_bg *= b_col[:, None]
    # A product may be fused into the sum, its own share unrounded: lanes that share a result would
    # differ in the last bit, and which of them is stored is undefined. A selected value is not.
    b_bg = tl.where(m_nr, b_bg, 0.0)
    b_col_terms = tl.where(m_nr, b_col_terms, 0.0)
    o_out = o_n[:, None] * R + o_r[None, :]
    if p_db is not None:
        tl.store(p_db + o_out, cast(b_g, p_db.dtype.element_ty), mask=m_nr)
    if p_drank is not None:
        tl.store(p_drank + tl.program_id(0) * R + o_r, tl.sum(b_bg, axis=0), mask=m_r)
    if p_dcol is not None:
        b_dcol = tl.sum(b_col_terms, axis=1)  # [BN]
        tl.store(p_dcol + o_n, cast(b_dcol, p_dcol.dtype.element_ty), mask=m_n)


def diagonals(
    g: Tensor,
    b: Tensor,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    db: Tensor | None,
    drank: Tensor | None,
    dcol: Tensor | None,
    scale: float,
) -> None:
    """From g = dyᵀ·s [N, R] in fp32: db, drank [R] and dcol [N], each where given."""
    n, r = g.shape
    br = max(16, next_power_of_2(r))
    bn = max(16, 8192 // br)
    parts = None
    if drank is not None:
        parts = g.new_empty((ceil(n / bn), r))
    run(
        _diagonals_kernel,
        (ceil(n / bn),),
        4,
        1,
        p_g=g,
        p_b=b,
        p_rank=rank_diag,
        p_col=out_diag,
        p_db=db,
        p_drank=parts,
        p_dcol=dcol,
        N=n,
        R=r,
        scale=float(scale),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        stride_rank=stride(rank_diag),
        stride_col=stride(out_diag),
        BN=bn,
        BR=br,
    )
    if drank is not None and parts is not None:
        splitk_reduce([Sum(parts, drank)])
