"""dora_norm by the Triton kernels: the norm of each row of W + scale·B·A."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.triton.arguments import matrix
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.nf4_tiles import weight_tile
from lora_kernels.ops.common.triton.tiles import dot
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.dora.schema import DoRANorm

_WARPS = 4


@triton.jit
def _norm_kernel(
    base,
    a,
    b,
    p_out,
    N,
    K,
    R,
    scale,
    ONE_RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """norm[n] = sqrt(Σ_k (w + scale · b·a)²[n, k]), the row in registers, a step of K at a time.

    2·N·K·(R + 2) FLOPs; bytes: w, a and b once, 4·N written. The products of 16-bit adapters are
    exact in fp32; fp32 ones are multiplied as such ("ieee"), whatever torch allows. A 4-bit
    w is decoded to fp32.
    Shapes: w[N, K] a[R, K] b[N, R], any strides; norm[N]. Grid: [cdiv(N, BN)].
    Sums in fp32, of K / BK squares in a row and then as a tree.
    """
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_n = o_n < N
    # A row past the last is the last one again, never stored: whole loads need no mask.
    o_row = tl.minimum(o_n, N - 1)
    if base.CHUNK > 0:
        b_table = tl.load(base.table + tl.arange(0, 16))
    else:
        p_w_tile = base.w + o_row[:, None] * base.w_row + o_k[None, :].to(tl.int64) * base.w_col
    if ONE_RANK:
        o_r = tl.arange(0, BR)
        m_r = o_r < R
        o_b = o_row[:, None] * b.row + o_r[None, :] * b.col
        b_b = tl.load(b.p + o_b, mask=m_r[None, :], other=0.0)  # [BN, BR]
    b_squares = tl.full([BN, BK], 0.0, tl.float32)  # [BN, BK]
    for k0 in range(0, K, BK):
        m_k = o_k < K - k0
        if base.CHUNK > 0:
            b_w = weight_tile(
                base, b_table, tl.program_id(0) * BN, k0, N, K, tl.float32, BN, BK
            )  # [BN, BK]
        else:
            if EVEN_K:
                b_w = tl.load(p_w_tile)  # [BN, BK]
            else:
                b_w = tl.load(p_w_tile, mask=m_k[None, :], other=0.0)
            p_w_tile += BK * base.w_col
        b_t = tl.full([BN, BK], 0.0, tl.float32)  # [BN, BK]
        p_a_tile = a.p + (k0 + o_k).to(tl.int64)[None, :] * a.col
        if ONE_RANK:
            m_a = m_r[:, None] & m_k[None, :]
            b_a = tl.load(p_a_tile + o_r[:, None] * a.row, mask=m_a, other=0.0)  # [BR, BK]
            b_t = dot(b_b, b_a, b_t, "ieee")
        else:
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)
                m_r = o_r < R
                o_b = o_row[:, None] * b.row + o_r[None, :] * b.col
                b_b = tl.load(b.p + o_b, mask=m_r[None, :], other=0.0)  # [BN, BR]
                m_a = m_r[:, None] & m_k[None, :]
                b_a = tl.load(p_a_tile + o_r[:, None] * a.row, mask=m_a, other=0.0)
                b_t = dot(b_b, b_a, b_t, "ieee")
        b_t = b_w.to(tl.float32) + b_t * scale
        b_squares += b_t * b_t
    tl.store(p_out + o_n, tl.sqrt_rn(tl.sum(b_squares, axis=1)), mask=m_n)


def dora_norm(c: DoRANorm) -> Tensor:
    """[N] in fp32. The sum itself is squared, so ‖W‖² is of no use: W is read anyway, and nothing
    cancels."""
    a, b, weight = c.a, c.b, Weight(c.base, c.meta)
    w = weight.base[0]
    n, k = c.meta[0], c.meta[1]
    r = a.shape[0]
    exact = a.dtype == torch.float32
    # fp32 products are unrolled: small steps of the rank keep the code, and its making, short.
    br = min(block_rank(r), 16) if exact else block_rank(r)
    wide = exact or weight.quantised or w.dtype == torch.float32
    step = 64 if wide else 128
    block = _rows(n, br, planned_device(w.device))
    norm = w.new_empty(n, dtype=torch.float32)
    run(
        _norm_kernel,
        (ceil(n / block),),
        _WARPS,
        3,
        base=weight.decode_args(step),
        a=matrix(a),
        b=matrix(b),
        p_out=norm,
        N=n,
        K=k,
        R=r,
        scale=float(c.scale),
        ONE_RANK=r <= br,
        EVEN_K=k % step == 0,
        BN=block,
        BK=step,
        BR=br,
    )
    return norm


def _rows(n: int, br: int, device: Device) -> int:
    """Rows of a program: each reads all of A, so many; but half the multiprocessors get one, and
    64 of them beside 64 rank columns spill."""
    block = 64 if br < 64 else 32
    while block > 16 and 2 * ceil(n / block) <= device.multiprocessors:
        block //= 2
    return block
