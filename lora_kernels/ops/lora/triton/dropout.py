"""The dropout mask as a tensor, for those who want to see it: the kernels never store it."""

import triton
import triton.language as tl

from lora_kernels.ops.common.tiles import keep_tile


@triton.jit
def _dropout_mask_kernel(
    p_seed, p_out, M, K, threshold, stream, BM: tl.constexpr, BK: tl.constexpr
):
    """out[m, k] = whether element (m, k) is kept.

    Shapes: out[M, K] of bytes. Grid: [cdiv(M, BM), cdiv(K, BK)].
    """
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    k0 = tl.program_id(1) * BK
    o_k = k0 + tl.arange(0, BK)
    m_keep = keep_tile(p_seed, o_m, k0, stream, threshold, BM, BK)  # [BM, BK]
    o_out = o_m[:, None] * K + o_k[None, :]
    tl.store(p_out + o_out, m_keep.to(tl.uint8), mask=(o_m < M)[:, None] & (o_k < K)[None, :])
