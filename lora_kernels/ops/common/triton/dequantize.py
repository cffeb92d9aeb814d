"""A 4-bit weight, or a slab of it, decoded to a dense one."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.nf4_tiles import block_scales, code_values, scale_offset, unpack
from lora_kernels.ops.common.triton.tiles import cast
from lora_kernels.ops.common.triton_host import run

CHUNK = 32  # weights that share a scale whatever the block size
_CHUNKS = 128  # of a tile: 16 bytes of codes a thread
_TILES = 4  # of a program, which loads the table once


@triton.jit
def _dequantize_kernel(
    base,
    p_out,
    size,
    chunks,
    first,
    width,
    row_chunks,
    programs,
    WHOLE: tl.constexpr,
    SLAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PER_SCALE: tl.constexpr,
):
    """out[i] = round(table[code[i]] · scale[i // block]), flat, or of a slab of columns.

    Shapes: codes u8 [(size + 1) / 2], high nibble first; scales as in `block_scales`, one for
        PER_SCALE chunks; out [chunks · CHUNK], its chunk c being the weight's chunk first + c,
        or where SLAB first + (c // width) · row_chunks + c % width. WHOLE: no chunk is cut short.
    Grid: [programs], each walking tiles of CHUNKS · CHUNK weights. Products in fp32.
    At least 0.5 bytes are read and out's are written per weight.
    """
    b_table = tl.load(base.table + tl.arange(0, 16))
    offset = scale_offset(base)
    o_byte = tl.arange(0, CHUNK // 2)
    o_weight = tl.arange(0, CHUNK)
    for tile in range(tl.program_id(0), tl.cdiv(chunks, CHUNKS), programs):
        o_to = tile * CHUNKS + tl.arange(0, CHUNKS)
        m_c = o_to < chunks
        if SLAB:
            o_c = first + (o_to // width).to(tl.int64) * row_chunks + o_to % width
        else:
            o_c = first + o_to.to(tl.int64)
        o_in = o_c[:, None] * (CHUNK // 2) + o_byte[None, :]
        o_out = o_to.to(tl.int64)[:, None] * CHUNK + o_weight[None, :]
        m_in = m_c[:, None]
        m_out = m_c[:, None]
        if not WHOLE:
            m_in = m_in & (o_in < (size + 1) // 2)
            m_out = m_out & (o_c[:, None] * CHUNK + o_weight[None, :] < size)
        b_bytes = tl.load(base.w + o_in, mask=m_in, other=0)  # [CHUNKS, CHUNK / 2]
        b_scale = block_scales(base, offset, o_c // PER_SCALE, m_c)  # [CHUNKS]
        b_value = code_values(unpack(b_bytes, CHUNKS, CHUNK), b_table, CHUNKS, CHUNK)
        b_out = cast(b_value * b_scale[:, None], p_out.dtype.element_ty)
        tl.store(p_out + o_out, b_out, mask=m_out)


def dequantize_slab(weight: Weight, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """W[rows, columns] in dtype: whole rows from the first of a chunk on, or columns of every row,
    in whole chunks where a row is made of them."""
    m = weight.meta
    out = weight.base[0].new_empty(
        (rows.stop - rows.start, columns.stop - columns.start), dtype=dtype
    )
    slab = out.shape[1] < m.k
    size = m.n * m.k
    chunks = ceil(out.numel() / CHUNK)
    programs = ceil(ceil(chunks / _CHUNKS) / _TILES)
    run(
        _dequantize_kernel,
        (programs,),
        4,
        1,
        base=weight.decode_args(CHUNK),
        p_out=out,
        size=size,
        chunks=chunks,
        first=(rows.start * m.k + columns.start) // CHUNK,
        width=out.shape[1] // CHUNK,
        row_chunks=m.k // CHUNK,
        PER_SCALE=m.block_size // CHUNK,
        programs=programs,
        WHOLE=size % CHUNK == 0,
        SLAB=slab,
        CHUNKS=_CHUNKS,
        CHUNK=CHUNK,
    )
    return out
