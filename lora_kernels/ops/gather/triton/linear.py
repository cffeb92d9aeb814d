"""The base product with each token's own adapter in its epilogue: y = x·Wᵀ + bias + scale·s·Bᵀ."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import product_tile, store_tile
from lora_kernels.ops.common.triton.tiles import cast, grouped_tile, rank_value
from lora_kernels.ops.common.triton_host import descriptor, precision, run, stride
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, layout
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.tiles import PAGE

# Elements of B that a thread loads before it uses the first: more take registers of the sums.
_IN_FLIGHT = 64


@triton.jit
def _own_rows_tile(
    b_y,
    p_s,
    p_b,
    p_keep,
    p_slots,
    p_pages,
    p_ranks,
    p_scales,
    p_thresholds,
    m0,
    n0,
    M,
    N,
    S,
    C,
    size,
    stride_s,
    stride_keep,
    PARTS: tl.constexpr,
    MASK_S: tl.constexpr,
    DTYPE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """b_y[m] + scale·s[m]·b of row m's own slot [BM, BN]; b_y itself in rows without an adapter.

    A rank at a time: every row reads its own row of its own page, so that of B nothing is asked for
    but what is needed, whatever the mix, and a row is the same in any company. UNROLL: ranks whose
    loads are under way together.
    """
    o_m = m0 + tl.arange(0, BM)
    o_n = n0 + tl.arange(0, BN)
    m_m = o_m < M
    b_slot = tl.load(p_slots + o_m, mask=m_m, other=-1)  # [BM]
    m_slot = (b_slot >= 0) & (b_slot < S)
    b_rank = tl.load(p_ranks + b_slot, mask=m_slot, other=0)
    b_rank = tl.minimum(b_rank, C * PAGE)
    m_own = b_rank > 0
    most = tl.max(b_rank, axis=0)
    if most > 0:
        p_own = p_pages + b_slot.to(tl.int64) * C  # [BM]
        p_sums = p_s + o_m.to(tl.int64) * stride_s  # [BM]
        if MASK_S:
            b_dropped = tl.load(p_thresholds + b_slot, mask=m_slot, other=0)
            b_whole = tl.full([BM], 65536.0, tl.float32)
            b_kept = tl.math.div_rn(b_whole, (65536 - b_dropped).to(tl.float32))
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        for c in range(0, tl.cdiv(most, PAGE)):
            b_page = tl.load(p_own + c, mask=b_rank > c * PAGE, other=0)  # [BM]
            p_page = p_b + b_page.to(tl.int64)[:, None] * (PAGE * N) + o_n[None, :]
            for j in tl.range(0, PAGE, num_stages=1, loop_unroll_factor=UNROLL):
                m_j = b_rank > c * PAGE + j
                b_s = tl.full([BM], 0.0, tl.float32)  # [BM]
                for part in tl.static_range(PARTS):
                    p_part = p_sums + part * size + c * PAGE + j
                    b_s += tl.load(p_part, mask=m_j, other=0.0).to(tl.float32)
                if MASK_S:
                    b_s *= b_kept
                b_s = rank_value(b_s, DTYPE)
                if p_keep is not None:
                    if n0 == 0:
                        o_keep = o_m.to(tl.int64) * stride_keep + c * PAGE + j
                        tl.store(p_keep + o_keep, b_s, mask=m_j)
                m_b = m_j[:, None] & (o_n < N)[None, :]
                b_b = tl.load(p_page + j * N, mask=m_b, other=0.0)  # [BM, BN]
                b_b = cast(b_b.to(tl.float32), DTYPE).to(tl.float32)
                b_z += b_s.to(tl.float32)[:, None] * b_b
        b_scale = tl.load(p_scales + b_slot, mask=m_own, other=0.0)  # [BM]
        b_y = tl.where(m_own[:, None], b_y + b_z * b_scale[:, None], b_y)
    return b_y


@triton.jit
def _gather_gemm_kernel(
    x,
    w,
    p_y,
    p_s,
    p_b,
    p_keep,
    p_bias,
    p_slots,
    p_pages,
    p_ranks,
    p_scales,
    p_thresholds,
    M,
    N,
    K,
    S,
    C,
    size,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ym,
    stride_s,
    stride_keep,
    stride_bias,
    programs,
    p_absmax,
    p_nested,
    p_map,
    p_offset,
    p_table,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    MASK_S: tl.constexpr,
    UNROLL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
):
    """y = x·w + scale·s·b + bias, b that of each row's own slot; tiles as in `_lora_gemm_kernel`
    without its branch, so that a row of no adapter is what that gives, bit for bit.

    Shapes: x[M, K] w[K, N] y[M, N] b[P, 16, N] s[M, ..] in PARTS parts of `size` elements, bias[N],
        slots[M] pages[S, C]. MASK_S: the parts still lack the factor of x's mask. keep takes s,
        rounded.
    Grid: [programs], each walking tiles of y in steps of `programs`. Sums in fp32.
    """
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    first = tl.program_id(0)
    end = tiles_m * tiles_n
    step = programs
    if not TMA:  # one tile a program
        end = first + 1
        step = 1
    for tile in tl.range(first, end, step):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        m0 = pid_m * BM
        n0 = pid_n * BN
        b_y = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        b_none = tl.full([BM, 16], 0.0, tl.float32)  # [BM, 16]
        b_y, b_none = product_tile(
            b_y, b_none, x, w, None, None, None, m0, n0, M, N, K, 0, 0, 0, stride_xm, stride_xk,
            stride_wk, stride_wn, 1, 1, 1, False, False, TMA, True, EVEN_K, PRECISION, DTYPE, BM,
            BN, BK, 16, False, CHUNK, BLOCK, NESTED, p_absmax, p_nested, p_map, p_offset, p_table,
        )  # fmt: skip
        b_y = _own_rows_tile(
            b_y, p_s, p_b, p_keep, p_slots, p_pages, p_ranks, p_scales, p_thresholds, m0, n0, M, N,
            S, C, size, stride_s, stride_keep, PARTS, MASK_S, DTYPE, BM, BN, UNROLL,
        )  # fmt: skip
        store_tile(b_y, p_y, p_bias, m0, n0, M, N, stride_ym, stride_bias, BM, BN)


def gemm_with_adapters(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    y: Tensor,
    s: Tensor,
    p: RankPages,
    entries: Entries,
    config: GemmConfig,
    device: Device,
    *,
    keep: Tensor | None,
    late: Mask | None,
) -> None:
    """y [T, N] = x·Wᵀ + bias + what each token's own adapter adds.

    Args:
        s: [T, ..], or fp32 parts [spans, T, ..].
        keep: takes the sums of the parts, [T, ..].
        late: the mask of x, whose factor the parts still lack.
    """
    (m, k), n = x.shape, y.shape[1]
    tiles = gemm_tiles(config, m, n)
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    run(
        _gather_gemm_kernel,
        (programs,),
        config.warps,
        config.stages,
        x=descriptor(x, [config.block_m, config.block_k]) if config.tma else x,
        p_y=y,
        p_s=s,
        p_b=p.b,
        p_keep=keep,
        p_bias=bias,
        p_slots=entries.slots,
        p_pages=p.table,
        p_ranks=p.ranks,
        p_scales=p.scales,
        p_thresholds=None if late is None else late.thresholds,
        M=m,
        N=n,
        K=k,
        S=entries.slots_count,
        C=p.table.shape[1],
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ym=y.stride(0),
        stride_keep=stride(keep),
        stride_bias=stride(bias),
        programs=programs,
        TMA=config.tma,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        PARTS=s.shape[0] if s.dim() == 3 else 1,
        MASK_S=late is not None,
        UNROLL=max(1, min(16, _IN_FLIGHT * 32 * config.warps // (config.block_m * config.block_n))),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        GROUP=config.group,
        **layout(s),
        **w.args(config, backward=False),
    )
