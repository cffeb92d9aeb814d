"""Triton kernels of the 4-bit codec: a launch reads and writes each byte once."""

import triton
import triton.language as tl

from lora_kernels.ops.common.nf4_tiles import block_scales, code_values, scale_offset, unpack
from lora_kernels.ops.common.tiles import cast


@triton.jit
def _dequantize_kernel(
    p_codes,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
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
    NESTED: tl.constexpr,
):
    """out[i] = round(table[code[i]] · scale[i // block]), flat, or of a slab of columns.

    Shapes: codes u8 [(size + 1) / 2], high nibble first; scales as in `block_scales`, one for
        PER_SCALE chunks; out [chunks · CHUNK], its chunk c being the weight's chunk first + c,
        or where SLAB first + (c // width) · row_chunks + c % width. WHOLE: no chunk is cut short.
    Grid: [programs], each walking tiles of CHUNKS · CHUNK weights. Products in fp32.
    At least 0.5 bytes are read and out's are written per weight.
    """
    b_table = tl.load(p_table + tl.arange(0, 16))
    offset = scale_offset(p_nested, p_offset)
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
        b_bytes = tl.load(p_codes + o_in, mask=m_in, other=0)  # [CHUNKS, CHUNK / 2]
        b_scale = block_scales(
            p_absmax, p_nested, p_map, offset, o_c // PER_SCALE, m_c, NESTED
        )  # [CHUNKS]
        b_value = code_values(unpack(b_bytes, CHUNKS, CHUNK), b_table, CHUNKS, CHUNK)
        b_out = cast(b_value * b_scale[:, None], p_out.dtype.element_ty)
        tl.store(p_out + o_out, b_out, mask=m_out)


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
