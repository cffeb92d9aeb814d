"""What the backward needs of dy beside dx: one read of it, and the end of its sums."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, split_size
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.strategies import one_read_parts
from lora_kernels.ops.common.triton.arguments import matrix, vector
from lora_kernels.ops.common.triton.splitk_reduce import Sum, splitk_reduce
from lora_kernels.ops.common.triton.tiles import cast, dot, dot_rank
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.dora.triton.scale import scale_tile


@triton.jit
def _column_sums(b_t, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ of the rows of b_t [ROWS, COLS] in fp32, in two steps: two short chains round less."""
    b_t = tl.reshape(b_t.to(tl.float32), [8, ROWS // 8, COLS])
    return tl.sum(tl.sum(b_t, axis=0), axis=0)


@triton.jit
def _dora_pass_kernel(
    dy,
    kept,
    s,
    b,
    magnitude,
    norm,
    p_m,
    p_ds,
    p_g,
    p_dbias,
    p_dots,
    M,
    N,
    R,
    per_split,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Partial sums of ds = dy·(m̂ ∘ b), g = dyᵀ·s, dbias = Σ_m dy and dots = Σ_m dy ∘ kept, each
    where it is wanted; and m̂ itself.

    4·M·N·R FLOPs; bytes: dy and kept once, s and b, and the parts.
    Shapes: dy[M, N] kept[M, N] s[M, R] b[N, R], magnitude and norm[N]; m[N], ds[N / BN, M, R],
        g[split_k, N, R], dbias and dots[split_k, N] in fp32.
    Grid: [cdiv(N, BN), parts of the rows, cdiv(R, BR)]; ds only where R <= BR. Sums in fp32.
    """
    dtype = dy.p.dtype.element_ty
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_r = tl.program_id(2)
    o_n = (pid_n * BN + tl.arange(0, BN)).to(tl.int64)
    o_r = pid_r * BR + tl.arange(0, BR)
    m_n = o_n < N
    m_r = o_r < R
    first = pid_m * per_split
    last = min(first + per_split, M)
    if p_ds is not None or p_m is not None:
        b_m = scale_tile(magnitude, norm, o_n, m_n)  # [BN]
        if p_m is not None:
            if pid_m + pid_r == 0:
                tl.store(p_m + o_n, b_m, mask=m_n)
    if p_ds is not None:
        o_b = o_n[:, None] * b.row + o_r[None, :] * b.col
        b_b = tl.load(b.p + o_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
        b_b = cast(b_b.to(tl.float32) * b_m[:, None], dtype)
    b_g = tl.full([BR, BN], 0.0, tl.float32)  # [BR, BN]
    b_dbias = tl.full([BN], 0.0, tl.float32)  # [BN]
    b_dots = tl.full([BN], 0.0, tl.float32)  # [BN]
    for m0 in range(first, last, BM):
        o_m = (m0 + tl.arange(0, BM)).to(tl.int64)
        m_m = o_m < last
        m_dy = m_m[:, None]
        if not EVEN_N:
            m_dy = m_dy & m_n[None, :]
        o_dy = o_m[:, None] * dy.row + o_n[None, :] * dy.col
        b_dy = tl.load(dy.p + o_dy, mask=m_dy, other=0.0)  # [BM, BN]
        if p_ds is not None:
            b_ds = dot(b_dy, b_b, tl.full([BM, BR], 0.0, tl.float32), PRECISION)  # [BM, BR]
            o_ds = (pid_n.to(tl.int64) * M + o_m[:, None]) * R + o_r[None, :]
            tl.store(p_ds + o_ds, b_ds, mask=m_m[:, None] & m_r[None, :])
        if p_g is not None:
            o_s = o_m[None, :] * s.row + o_r[:, None] * s.col
            b_s = tl.load(s.p + o_s, mask=m_m[None, :] & m_r[:, None], other=0.0)  # [BR, BM]
            b_g = dot_rank(b_s, b_dy, b_g, dtype, PRECISION)
        if p_dbias is not None:
            b_dbias += _column_sums(b_dy, BM, BN)
        if p_dots is not None:
            o_kept = o_m[:, None] * kept.row + o_n[None, :] * kept.col
            b_kept = tl.load(kept.p + o_kept, mask=m_dy, other=0.0)  # [BM, BN]
            b_dots += _column_sums(b_dy.to(tl.float32) * b_kept.to(tl.float32), BM, BN)
    if p_g is not None:
        o_g = (pid_m.to(tl.int64) * N + o_n[None, :]) * R + o_r[:, None]
        tl.store(p_g + o_g, b_g, mask=m_n[None, :] & m_r[:, None])
    o_part = pid_m.to(tl.int64) * N + o_n
    if pid_r == 0:
        if p_dbias is not None:
            tl.store(p_dbias + o_part, b_dbias, mask=m_n)
        if p_dots is not None:
            tl.store(p_dots + o_part, b_dots, mask=m_n)


def shrink_and_wgrad(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    kept: Tensor | None,
    scales: Tensor,
    sums: tuple[Tensor, Tensor | None] | None,
    db: Tensor | None,
    dmagnitude: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    device: Device,
) -> None:
    """One read of dy, and of kept where given, for m̂, db, dmagnitude, dbias and the sums ds, with
    what rounding takes from them, where given."""
    ds, residual = sums or (None, None)
    m, n = dy.shape
    r = b.shape[1]
    size, br = dy.element_size(), block_rank(r)
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    rows = max(m, 1)
    parts_n, parts_m = one_read_parts(rows, max(n, 1), device, bn)
    per_split = split_size(rows, parts_m, bm)
    parts_m = ceil(rows / per_split)

    def parts(wanted: object, *shape: int) -> Tensor | None:
        return None if wanted is None else dy.new_empty(shape, dtype=torch.float32)

    parts_ds, parts_g = parts(ds, parts_n, m, r), parts(db, parts_m, n, r)
    parts_bias, parts_dots = parts(dbias, parts_m, n), parts(kept, parts_m, n)
    run(
        _dora_pass_kernel,
        (ceil(n / bn), parts_m, 1 if db is None else ceil(r / br)),
        8 if bn == 256 else 4,
        1,  # products and lanes read the same tile: see `tiles.in_registers`
        dy=matrix(dy),
        kept=matrix(kept),
        s=matrix(s),
        b=matrix(b),
        magnitude=vector(magnitude),
        norm=vector(norm),
        p_m=scales,
        p_ds=parts_ds,
        p_g=parts_g,
        p_dbias=parts_bias,
        p_dots=parts_dots,
        M=m,
        N=n,
        R=r,
        per_split=per_split,
        EVEN_N=n % bn == 0,
        PRECISION=precision(dy.dtype),
        BM=bm,
        BN=bn,
        BR=br,
    )
    sums = (
        (parts_ds, ds, {"factor": scale, "residual": residual}),
        (parts_g, db, {"factor": scale, "row": scales}),
        (parts_bias, dbias, {}),
        (parts_dots, dmagnitude, {}),
    )
    splitk_reduce([Sum(p, out, **how) for p, out, how in sums if p is not None and out is not None])
