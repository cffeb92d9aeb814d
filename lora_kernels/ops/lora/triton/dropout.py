"""The dropout mask as a tensor, for those who want to see it: the kernels never store it."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.launch import Launch, executor
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.triton.tiles import keep_tile
from lora_kernels.ops.lora.schema import DropoutMask


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


def dropout_mask(c: DropoutMask) -> Tensor:
    """The boolean keep mask [rows, cols]."""
    rows, cols = c.rows, c.cols
    out = torch.empty((rows, cols), dtype=torch.bool, device=c.seed.device)
    if out.numel():
        args = {
            "p_seed": c.seed,
            "p_out": out.view(torch.uint8),
            "M": rows,
            "K": cols,
            "threshold": threshold(c.p),
            "stream": c.stream,
            "BM": 16,
            "BK": 128,
        }
        grid = (ceil(rows / 16), ceil(cols / 128))
        executor().run(Launch(_dropout_mask_kernel, grid, args, warps=4, stages=1))
    return out
