"""Triton primitives that every kernel of this package is made of.

Names: `b_` a block's values, `p_` a pointer, `o_` offsets, `m_` a mask.
"""

import triton
import triton.language as tl

from lora_kernels.ops.common.philox import MULTIPLIERS, ROUNDS, WEYL
from lora_kernels.ops.common.triton_version import FENCES_COPIES, release

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_UNFENCED = tl.constexpr(release(triton.__version__) < FENCES_COPIES)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
_WEYL_0, _WEYL_1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def dot(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_left·b_right, summed in fp32.

    PRECISION concerns fp32 operands: "ieee", or "tf32" where torch allows it. The interpreter
    would multiply the raw bits of bf16, so there the operands are widened to fp64. A step
    of fp32 operands is summed by itself before it is added: two short chains round less than one.
    """
    if _INTERPRETED:
        b_step = tl.dot(b_left.to(tl.float64), b_right.to(tl.float64), out_dtype=tl.float64)
        return b_sum + b_step.to(tl.float32)
    if PRECISION == "ieee" and b_left.dtype == tl.float32:
        # Subtracted, because the compiler would make one chain of a sum.
        return b_sum - tl.dot(-b_left, b_right, input_precision=PRECISION)
    return tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)


@triton.jit
def cast(b_value, dtype: tl.constexpr):
    """b_value in another float type, rounded to nearest even.

    The interpreter would cut fp32 off to bf16, and lose subnormal numbers: there bits are rounded.
    """
    if _INTERPRETED:
        if dtype == tl.bfloat16 and b_value.dtype == tl.float32:
            bits = b_value.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(b_value == b_value, rounded, (bits >> 16) | 0x40)
            return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_value.to(dtype)


@triton.jit
def rank_value(b_value, dtype: tl.constexpr):
    """fp32 values of s or ds as they are kept for activations of dtype: see `rank.py`."""
    if dtype == tl.float16:
        bits = b_value.to(tl.uint32, bitcast=True)
        bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
        b_rounded = bits.to(tl.float32, bitcast=True)
        b_kept = tl.where(tl.abs(b_value) < float("inf"), b_rounded, b_value)
    else:
        b_kept = cast(b_value, dtype)
    return b_kept


@triton.jit
def _powers(b_rank, AXIS: tl.constexpr):
    """Powers of two that take the largest magnitude along AXIS to 2^14 and above, the top of fp16,
    and their inverses; from 2^-40 to 2^64, so that what is divided by one stays a number."""
    bits = tl.max(tl.abs(b_rank), axis=AXIS).to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits & 0x7F800000, 0x32800000), 0x66800000) - 0x07000000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def dot_rank(
    b_rank,
    b_right,
    b_sum,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr = False,
):
    """b_sum + b_rank·b_right for a left side that is rank-wide and rounded to DTYPE; with RESIDUAL
    once more for what rounding takes from it.

    fp16 lacks its range: there each row, and the sums of the row meanwhile, are divided by a power
    of two. The right side stays fp16 in shared memory; tf32 products would need twice of that.
    """
    if tl.float16 == DTYPE:
        b_power, b_inverse = _powers(b_rank, 1)
        b_rank = b_rank.to(tl.float32) * b_inverse[:, None]
        b_sum *= b_inverse[:, None]
    if RESIDUAL:
        b_sum = dot(rounding_residual(b_rank, DTYPE), b_right, b_sum, PRECISION)
    b_sum = dot(cast(b_rank, DTYPE), b_right, b_sum, PRECISION)
    if tl.float16 == DTYPE:
        b_sum *= b_power[:, None]
    return b_sum


@triton.jit
def dot_by_rank(
    b_left,
    b_rank,
    b_sum,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDUAL: tl.constexpr = False,
):
    """b_sum + b_left·b_rank, as `dot_rank` does it with the columns of the right side."""
    if tl.float16 == DTYPE:
        b_power, b_inverse = _powers(b_rank, 0)
        b_rank = b_rank.to(tl.float32) * b_inverse[None, :]
        b_sum *= b_inverse[None, :]
    if RESIDUAL:
        b_sum = dot(b_left, rounding_residual(b_rank, DTYPE), b_sum, PRECISION)
    b_sum = dot(b_left, cast(b_rank, DTYPE), b_sum, PRECISION)
    if tl.float16 == DTYPE:
        b_sum *= b_power[None, :]
    return b_sum


@triton.jit
def rounding_residual(b_value, dtype: tl.constexpr):
    """What rounding to dtype takes from fp32 values, itself rounded; 0 where a value overflows."""
    b_rounded = cast(b_value, dtype).to(tl.float32)
    return cast(tl.where(tl.abs(b_rounded) < float("inf"), b_value - b_rounded, 0.0), dtype)


@triton.jit
def in_registers(b_value):
    """b_value, for a product on Hopper whose left side must come from registers.

    Triton 3.9 keeps one buffer too few of a tile that a warpgroup's product reads from shared
    memory while something else loads it into registers.
    """
    if _INTERPRETED:
        return b_value
    PACK: tl.constexpr = 32 // b_value.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [b_value], b_value.dtype, True, PACK
    )


@tl.core.builtin
def _on_hopper(_semantic=None):
    """Whether a kernel is compiled for a GPU whose products of 64 rows or more are `wgmma`."""
    return tl.constexpr(getattr(_semantic.builder.options, "arch", None) == "sm90")


@triton.jit
def load_step(p_tile, m_step, EVEN: tl.constexpr):
    """A tile of one step of a sum, which EVEN steps fill; what is masked is 0."""
    if EVEN:
        b_tile = tl.load(p_tile)
    else:
        b_tile = tl.load(p_tile, mask=m_step, other=0.0)
    return b_tile


@triton.jit
def waited(b_sum):
    """b_sum once its product is done, and every one before it: for the last product of a step that
    makes a left side in registers.

    Left to run on, Hopper's products read such registers while the next step overwrites them: so do
    Triton up to 3.7, and ptxas before CUDA 13.3, which Triton up to 3.8 brings. A sum that an
    instruction takes is waited for, here by one that does nothing. It costs less than the copies of
    the registers that Triton 3.9 would make.
    """
    if not _INTERPRETED:
        if _on_hopper():
            b_sum = tl.inline_asm_elementwise("", "=f,0", [b_sum], tl.float32, True, 1)
    return b_sum


@triton.jit
def fence_copies():
    """Between a step's loads and its products: lets Hopper's products see what cp.async copied to
    shared memory, as the PTX ISA asks for and Triton 3.6 does not."""
    if not _INTERPRETED:
        if _UNFENCED:
            if _on_hopper():
                FENCE: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, 0;"
                tl.inline_asm_elementwise(FENCE, "=r", [], tl.int32, False, 1)


@triton.jit
def add_sums(b_sums, b_value, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """b_sums + the sums of b_value [M, N] along its rows into b_sums [M, any], or down its COLUMNS
    into b_sums [any, N], over and over.

    16-bit values are multiplied by ones, which reads a tile as another product of it does: without
    conflicts, and with Triton's count of buffers right (see `in_registers`).
    """
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    if tl.float32 == b_value.dtype:
        b_sums += tl.expand_dims(tl.sum(b_value, axis=AXIS), AXIS)
    elif COLUMNS:
        b_ones = tl.full([b_sums.shape[0], b_value.shape[0]], 1.0, b_value.dtype)
        b_sums = dot(b_ones, b_value, b_sums, PRECISION)
    else:
        b_ones = tl.full([b_value.shape[1], b_sums.shape[1]], 1.0, b_value.dtype)
        b_sums = dot(b_value, b_ones, b_sums, PRECISION)
    return b_sums


@triton.jit
def first_of(b_sums, AXIS: tl.constexpr):
    """The first row (AXIS 0) or column (1) of a tile."""
    o = tl.expand_dims(tl.arange(0, b_sums.shape[AXIS]), 1 - AXIS)
    return tl.sum(tl.where(o == 0, b_sums, 0.0), axis=AXIS)


@triton.jit
def scale_tile(p_magnitude, magnitude_step, p_norm, norm_step, o_n, m_n):
    """DoRA's m̂ = magnitude / norm in fp32, and 1 where the norm is 0 or masked: a row of zeros has
    no direction to scale."""
    b_norm = tl.load(p_norm + o_n * norm_step, mask=m_n, other=0.0).to(tl.float32)
    b_magnitude = tl.load(p_magnitude + o_n * magnitude_step, mask=m_n, other=0.0).to(tl.float32)
    m_norm = b_norm > 0
    return tl.where(m_norm, tl.math.div_rn(b_magnitude, tl.where(m_norm, b_norm, 1.0)), 1.0)


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, numbered so that neighbours in time share rows and columns of L2:
    GROUP tile rows are walked column by column."""
    first = (tile // (GROUP * tiles_n)) * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def _keep_words(p_seed, o_m, k0, stream, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Four words [ROWS, COLS / 8] for every eight columns: Philox4x32-7, see `philox.py`."""
    seed = tl.load(p_seed)
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = tl.full([ROWS, COLS // 8], 0, tl.uint32)
    c0 = zero + (k0 // 8 + tl.arange(0, COLS // 8))[None, :].to(tl.uint32)
    c1 = zero + o_m[:, None].to(tl.uint32)
    c2 = zero + tl.full([1, 1], stream, tl.uint32)
    c3 = zero
    by_0 = tl.full([1, 1], _MULTIPLIER_0, tl.uint32)
    by_1 = tl.full([1, 1], _MULTIPLIER_1, tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_0 = tl.umulhi(c0, by_0)
        high_1 = tl.umulhi(c2, by_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, c2 * by_1, high_0 ^ c3 ^ key_1, c0 * by_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def keep_tile(p_seed, o_m, k0, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The dropout mask [ROWS, COLS] of rows o_m and columns k0.. (a multiple of 8)."""
    c0, c1, c2, c3 = _keep_words(p_seed, o_m, k0, stream, ROWS, COLS)
    # Words in order, then their low and high halves: what a thread holds are neighbours in a row.
    words = tl.permute(tl.join(tl.join(c0, c1), tl.join(c2, c3)), 0, 1, 3, 2)
    halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, COLS / 8, 2, 2, 2]
    return tl.reshape(halves, [ROWS, COLS]) >= tl.full([1, 1], threshold, tl.uint32)


@triton.jit
def keep_operand(p_seed, o_m, k0, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`keep_tile` for what a product is made of.

    Behind a join Triton lays an operand out as for 8-bit values and reads it with bank conflicts,
    so here each of eight columns picks its half of a word. Where a product's sums are masked that
    would draw the words anew in every thread of a row.
    """
    c0, c1, c2, c3 = _keep_words(p_seed, o_m, k0, stream, ROWS, COLS)
    o_half = tl.arange(0, 8)[None, None, :]
    b_front = tl.where(o_half < 2, c0[:, :, None], c1[:, :, None])
    b_back = tl.where(o_half < 6, c2[:, :, None], c3[:, :, None])
    b_word = tl.where(o_half < 4, b_front, b_back)  # [ROWS, COLS / 8, 8]
    b_half = tl.where(o_half % 2 == 0, b_word & 0xFFFF, b_word >> 16)
    return tl.reshape(b_half, [ROWS, COLS]) >= tl.full([1, 1], threshold, tl.uint32)
