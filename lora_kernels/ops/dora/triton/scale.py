"""m̂ = magnitude / norm, the scale of each output."""

from __future__ import annotations

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import vector
from lora_kernels.ops.common.triton.tiles import scale_tile
from lora_kernels.ops.common.triton_host import run

_BLOCK = 512  # four elements a thread: each fp32 store is 16 bytes beside its neighbour's


@triton.jit
def inverse_tile(norm, o_n, m_n):
    """1 / norm in fp32, and 0 where the norm is 0 or masked."""
    b_norm = tl.load(norm.p + o_n * norm.step, mask=m_n, other=0.0).to(tl.float32)
    m_norm = b_norm > 0
    return tl.where(m_norm, tl.math.div_rn(1.0, tl.where(m_norm, b_norm, 1.0)), 0.0)


@triton.jit
def _scale_kernel(magnitude, norm, p_out, N, BN: tl.constexpr):
    """out = m̂, as `scale_tile` makes it. N divisions; 12·N bytes.

    Shapes: magnitude[N] norm[N], out[N] in fp32. Grid: [cdiv(N, BN)].
    """
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_m = scale_tile(magnitude.p, magnitude.step, norm.p, norm.step, o_n, m_n)  # [BN]
    tl.store(p_out + o_n, b_m, mask=m_n)


def output_scales(magnitude: Tensor, norm: Tensor, out: Tensor) -> None:
    """m̂ [N] in fp32."""
    run(
        _scale_kernel,
        (ceil(out.numel() / _BLOCK),),
        4,
        1,
        magnitude=vector(magnitude),
        norm=vector(norm),
        p_out=out,
        N=out.numel(),
        BN=_BLOCK,
    )
