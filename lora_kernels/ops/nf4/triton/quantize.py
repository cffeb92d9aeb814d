"""nf4_quantize, nf4_quantize_scales and nf4_dequantize by Triton kernels: one launch each."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.checks import check_finite
from lora_kernels.ops.common.code_tables import code_bounds
from lora_kernels.ops.common.configs import next_power_of_2
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.dequantize import dequantize_slab
from lora_kernels.ops.common.triton.nf4_tiles import code_values
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.nf4.schema import NF4Dequantize, NF4Quantize, NF4QuantizeScales

_QUANTIZED = 4096  # weights of a tile, the largest block


@triton.jit
def _quantize_kernel(
    p_w,
    p_bounds,
    p_order,
    p_codes,
    p_absmax,
    size,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """absmax[b] = max |w| of block b; code = the nearest table entry of w · (1 / absmax).

    A value takes the code at the number of bounds strictly below it.

    Shapes: w[size]; bounds fp32 [15]; order u8 [16]: the codes in order of value; codes u8
        [(size + 1) / 2], high nibble first; absmax fp32 [blocks].
    Grid: [cdiv(blocks, BLOCKS)]. All in fp32.
    """
    o_b = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    o_w = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_w = tl.load(p_w + o_w, mask=o_w < size, other=0.0).to(tl.float32)  # [BLOCKS, BLOCK]
    b_max = tl.max(tl.abs(b_w), axis=1)  # [BLOCKS]
    tl.store(p_absmax + o_b, b_max, mask=o_b * BLOCK < size)
    # bitsandbytes' floor for the scale that it divides by: a block of zeros encodes as zeros. As a
    # bare number it is below fp32's normal ones, which Triton 3.6 takes for fp64.
    b_floor = tl.maximum(b_max, tl.full([BLOCKS], 1e-38, tl.float32))
    b_inverse = tl.math.div_rn(tl.full([BLOCKS], 1.0, tl.float32), b_floor)
    b_scaled = tl.minimum(tl.maximum(b_w * b_inverse[:, None], -1.0), 1.0)
    b_place = tl.full([BLOCKS, BLOCK], 0, tl.int32)
    for i in tl.static_range(15):
        b_place += (b_scaled > tl.load(p_bounds + i)).to(tl.int32)
    b_order = tl.load(p_order + tl.arange(0, 16)).to(tl.int32)
    b_codes = code_values(b_place, b_order, BLOCKS, BLOCK)
    b_high, b_low = tl.split(tl.reshape(b_codes, [BLOCKS, BLOCK // 2, 2]))
    o_byte = o_b[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    b_bytes = ((b_high << 4) | b_low).to(tl.uint8)
    tl.store(p_codes + o_byte, b_bytes, mask=o_byte < (size + 1) // 2)


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


@triton.jit
def _quantize_scales_kernel(
    p_absmax,
    p_map,
    p_offset,
    p_codes,
    p_nested,
    size,
    block,
    STEP: tl.constexpr,
):
    """nested[b] = max |absmax - offset| of block b; codes: the map's entry nearest to
    (absmax - offset) · (1 / nested) on bitsandbytes' grid of 65536 points (see the reference).

    Shapes: absmax fp32 [size]; map fp32 [256], ascending; codes u8 [size]; nested fp32 [blocks].
    Grid: [blocks]. In fp32; a choice between product and sum keeps the compiler from fusing them.
    """
    pid = tl.program_id(0)
    begin = pid.to(tl.int64) * block
    end = tl.minimum(begin + block, size)
    offset = tl.load(p_offset)
    o_step = tl.arange(0, STEP)
    b_max = tl.full([STEP], 0.0, tl.float32)
    for i in range(begin, end, STEP):
        m_step = o_step < end - i
        b_centred = tl.load(p_absmax + i + o_step, mask=m_step, other=0.0) - offset
        b_max = tl.maximum(b_max, tl.where(m_step, tl.abs(b_centred), 0.0))
    largest = tl.max(b_max, axis=0)
    tl.store(p_nested + pid, largest)
    inverse = tl.math.div_rn(1.0, largest)
    for i in range(begin, end, STEP):
        m_step = o_step < end - i
        b_x = (tl.load(p_absmax + i + o_step, mask=m_step, other=0.0) - offset) * inverse
        b_x = tl.where(b_x == b_x, b_x, -1.0)  # 0 · (1 / 0), in a block of equal scales
        b_grid = tl.where(m_step, (b_x + 1.0) * 32767.5, 0.0) + 0.5
        b_grid = tl.minimum(tl.maximum(tl.floor(b_grid), 0.0), 65535.0)
        b_x = tl.math.div_rn(b_grid, tl.full([STEP], 32767.5, tl.float32)) - 1.0
        b_upper = tl.full([STEP], 0, tl.int32)  # the first entry that is not below x
        for bit in tl.static_range(8):
            b_next = b_upper + (128 >> bit)
            b_upper = tl.where(tl.load(p_map + b_next - 1) < b_x, b_next, b_upper)
        b_upper = tl.minimum(tl.maximum(b_upper, 1), 255)
        b_below, b_above = tl.load(p_map + b_upper - 1), tl.load(p_map + b_upper)
        b_nearer = tl.abs(b_above - b_x) < tl.abs(b_x - b_below)
        b_code = tl.where(b_nearer, b_upper, b_upper - 1)
        tl.store(p_codes + i + o_step, b_code.to(tl.uint8), mask=m_step)


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


def nf4_dequantize(c: NF4Dequantize) -> Tensor:
    """W [N, K] in dtype."""
    n, k = c.meta[:2]
    return dequantize_slab(Weight(c.base, c.meta), slice(0, n), slice(0, k), c.dtype)
