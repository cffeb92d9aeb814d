"""The dropout mask as words of 16 bits: made once, and unpacked where it is needed."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.tiles import keep_tile
from lora_kernels.ops.common.triton_host import Dropout, run

# Columns that a row of words is padded to: no step of any tile is longer.
_STEP = 256


@triton.jit
def words_tile(words, m0, k0, M, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to the words of a tile [ROWS, COLS]; k0 is a multiple of COLS <= 256. A row past the
    last is the last one again; past K there is padding."""
    o_m = tl.minimum(tl.arange(0, ROWS), M - 1 - m0)
    p_tile = words.p + m0.to(tl.int64) * words.row + k0 // 16
    return p_tile + o_m[:, None] * words.row + tl.arange(0, COLS // 16)[None, :]


@triton.jit
def unpack_mask(b_words, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The mask [ROWS, COLS] of its words [ROWS, COLS / 16]."""
    b_bits = (b_words.to(tl.int32)[:, :, None] >> tl.arange(0, 16)[None, None, :]) & 1
    return tl.reshape(b_bits, [ROWS, COLS]) != 0


@triton.jit
def _mask_words_kernel(
    p_seed, p_out, M, threshold, stream, stride_om, BM: tl.constexpr, BK: tl.constexpr
):
    """out[m, k / 16] = the mask of 16 columns, the first in the lowest bit.

    M·K / 8 Philox calls; M·K / 8 bytes written.
    Shapes: out[M, words] int16. Grid: [cdiv(M, BM), words·16 / BK].
    """
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    k0 = tl.program_id(1) * BK
    m_keep = keep_tile(p_seed, o_m, k0, stream, threshold, BM, BK)  # [BM, BK]
    b_bits = tl.reshape(m_keep.to(tl.int32), [BM, BK // 16, 16])
    b_words = tl.sum(b_bits << tl.arange(0, 16)[None, None, :], axis=2)  # [BM, BK / 16]
    o_out = o_m[:, None] * stride_om + (k0 // 16 + tl.arange(0, BK // 16))[None, :]
    tl.store(p_out + o_out, b_words.to(tl.int16), mask=(o_m < M)[:, None])


def mask_words(dropout: Dropout, x: Tensor) -> Tensor:
    """The mask of x [M, K] as words [M, K / 16 and padding], an eighth of a byte an element."""
    m, k = x.shape
    steps = ceil(k / _STEP)
    out = x.new_empty((m, steps * _STEP // 16), dtype=torch.int16)
    run(
        _mask_words_kernel,
        (ceil(m / 16), steps),
        4,
        1,
        p_seed=dropout.seed,
        p_out=out,
        M=m,
        threshold=dropout.threshold,
        stream=dropout.stream,
        stride_om=out.stride(0),
        BM=16,
        BK=_STEP,
    )
    return out
