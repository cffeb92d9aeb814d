"""Triton pieces that decode 4-bit weights. One rounding rule: weight = round(code · scale) to the
type of the product, whoever decodes it."""

import triton
import triton.language as tl

from lora_kernels.ops.common.triton.tiles import cast


@triton.jit
def scale_offset(base):
    """What every nested scale is off by."""
    offset = 0.0
    if base.nested is not None:
        offset = tl.load(base.offset)
    return offset


@triton.jit
def block_scales(base, offset, o_block, m_block):
    """The fp32 scales of blocks o_block; nested ones are map[absmax] · nested + offset,
    one `nested` for NESTED blocks. `base`: see `arguments.Base`.

    The product and the sum round separately: the choice between them keeps the compiler from making
    one multiply-add of both.
    """
    b_scale = tl.load(base.absmax + o_block, mask=m_block, other=0)
    if base.nested is not None:
        b_value = tl.load(base.map + b_scale.to(tl.int32))
        b_nested = tl.load(base.nested + o_block // base.NESTED, mask=m_block, other=0.0)
        b_scale = tl.where(m_block, b_value * b_nested, 0.0) + offset
    return b_scale


@triton.jit
def code_values(b_codes, b_table, ROWS: tl.constexpr, COLS: tl.constexpr):
    """b_table[b_codes] for codes [ROWS, COLS]: a table of 16 words has no bank conflicts."""
    b_flat = tl.gather(b_table, tl.reshape(b_codes.to(tl.int32), [ROWS * COLS]), 0)
    return tl.reshape(b_flat, [ROWS, COLS])


@triton.jit
def unpack(b_bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The codes [ROWS, COLS] of bytes [ROWS, COLS / 2], high nibble first."""
    return tl.reshape(tl.join(b_bytes >> 4, b_bytes & 15), [ROWS, COLS])


@triton.jit
def weight_tile(
    base,
    b_table,
    row,
    col,
    rows,
    cols,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """W[row.., col..] [ROWS, COLS] of a 4-bit W [rows, cols], rounded to DTYPE; 0 outside.

    base: an `arguments.Base`. Its CHUNK: weights of a row that always share a scale, a power of two
    that divides COLS; 1 also takes rows of odd length, a nibble at a time. BLOCK and NESTED are
    known to the compiler: else it would call a division of 64 bits, whose operands go by the stack.
    """
    CHUNK: tl.constexpr = base.CHUNK
    p_codes = base.w
    o_row = (row + tl.arange(0, ROWS)).to(tl.int64)
    m_row = o_row < rows
    if CHUNK > 1:
        half = cols // 2
        if CHUNK >= 32:
            half = tl.multiple_of(half, 16)
        o_byte = col // 2 + tl.arange(0, COLS // 2)
        m_byte = m_row[:, None] & (o_byte < half)[None, :]
        p_tile = p_codes + o_row[:, None] * half + o_byte[None, :]
        b_codes = unpack(tl.load(p_tile, mask=m_byte, other=0), ROWS, COLS)
    else:
        o_col = col + tl.arange(0, COLS)
        o_flat = o_row[:, None] * cols + o_col[None, :]
        m_flat = m_row[:, None] & (o_col < cols)[None, :]
        b_byte = tl.load(p_codes + o_flat // 2, mask=m_flat, other=0)
        b_codes = tl.where(o_flat % 2 == 0, b_byte >> 4, b_byte & 15)
    b_value = code_values(b_codes, b_table, ROWS, COLS)  # [ROWS, COLS]
    o_first = tl.arange(0, COLS // CHUNK) * CHUNK + col
    o_block = (o_row[:, None] * cols + o_first[None, :]) // base.BLOCK
    m_block = m_row[:, None] & (o_first < cols)[None, :]
    offset = scale_offset(base)
    b_scale = block_scales(base, offset, o_block, m_block)
    b_scale = tl.where(m_block, b_scale, 0.0)  # [ROWS, COLS / CHUNK]
    if CHUNK == 1:
        return cast(b_value * b_scale, DTYPE)
    b_value = tl.reshape(b_value, [ROWS, COLS // CHUNK, CHUNK]) * b_scale[:, :, None]
    return cast(tl.reshape(b_value, [ROWS, COLS]), DTYPE)


@triton.jit
def right_tile(
    base,
    b_table,
    k0,
    n0,
    K,
    N,
    W_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """w[k0.., n0..] [BK, BN], the right side of a product, of a 4-bit W that is [N, K] where
    W_ROWS, else [K, N]; the rest as in `weight_tile`."""
    if W_ROWS:
        b_w = weight_tile(base, b_table, n0, k0, N, K, DTYPE, BN, BK).T
    else:
        b_w = weight_tile(base, b_table, k0, n0, K, N, DTYPE, BK, BN)
    return b_w
