"""nf4_quantize, nf4_quantize_scales and nf4_dequantize by Triton kernels: one launch each."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.checks import check_finite
from lora_kernels.ops.common.configs import next_power_of_2
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.nf4.schema import NF4Dequantize, NF4Quantize, NF4QuantizeScales
from lora_kernels.ops.nf4.tables import code_bounds
from lora_kernels.ops.nf4.triton.base import Weight, scale_args, table
from lora_kernels.ops.nf4.triton.kernels import (
    _dequantize_kernel,
    _quantize_kernel,
    _quantize_scales_kernel,
)

CHUNK = 32  # weights that share a scale whatever the block size
_CHUNKS = 128  # of a tile: 16 bytes of codes a thread
_TILES = 4  # of a program, which loads the table once
_QUANTIZED = 4096  # weights of a tile, the largest block


def nf4_dequantize(c: NF4Dequantize) -> Tensor:
    """W [N, K] in dtype."""
    n, k = c.meta[:2]
    return dequantize_slab(Weight(c.base, c.meta), slice(0, n), slice(0, k), c.dtype)


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
        p_codes=weight.base[0],
        p_table=table(m.quant_type, out.device),
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
        **scale_args(weight.base, m),
    )
    return out


def nf4_quantize(c: NF4Quantize) -> tuple[Tensor, Tensor]:
    """codes u8 and absmax fp32 of a weight, flat blocks; `check_finite` waits for the device."""
    w, block_size = c.w, c.block_size
    check_finite("w", w)
    flat = w.reshape(-1)
    size = flat.numel()
    codes = w.new_empty((size + 1) // 2, dtype=torch.uint8)
    absmax = w.new_empty(ceil(size / block_size), dtype=torch.float32)
    bounds, order = code_bounds(c.quant_type, w.device)
    blocks = max(1, _QUANTIZED // block_size)
    run(
        _quantize_kernel,
        (ceil(absmax.numel() / blocks),),
        8,
        1,
        p_w=flat,
        p_bounds=bounds,
        p_order=order,
        p_codes=codes,
        p_absmax=absmax,
        size=size,
        BLOCKS=blocks,
        BLOCK=block_size,
    )
    return codes, absmax


def nf4_quantize_scales(c: NF4QuantizeScales) -> tuple[Tensor, Tensor]:
    """codes u8 and nested scales fp32 of absmax; `check_finite` waits for the device."""
    absmax, nested_block_size = c.absmax, c.nested_block_size
    check_finite("absmax", absmax)
    size = absmax.numel()
    codes = absmax.new_empty(size, dtype=torch.uint8)
    nested = absmax.new_empty(ceil(size / nested_block_size))
    run(
        _quantize_scales_kernel,
        (nested.numel(),),
        4,
        1,
        p_absmax=absmax,
        p_map=c.nested_map,
        p_offset=c.nested_offset,
        p_codes=codes,
        p_nested=nested,
        size=size,
        block=nested_block_size,
        STEP=min(1024, max(16, next_power_of_2(nested_block_size))),
    )
    return codes, nested
