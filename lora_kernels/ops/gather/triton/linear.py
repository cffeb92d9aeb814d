"""The base product with each token's own adapter in its epilogue: y = x·Wᵀ + bias + scale·s·Bᵀ."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import Device, GemmConfig, gemm_tiles
from lora_kernels.ops.common.triton.arguments import left, matrix, tile, vector
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.lora_tiles import product_tile, store_tile
from lora_kernels.ops.common.triton.tiles import cast, grouped_tile, rank_value
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.arguments import Mask, rank_pages, shrunk
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.tiles import PAGE

# Elements of B that a thread loads before it uses the first: more take registers of the sums.
_IN_FLIGHT = 64


@triton.jit
def _own_rows_tile(
    b_y,
    s,
    pages,
    keep,
    p_slots,
    p_thresholds,
    m0,
    n0,
    M,
    N,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    DTYPE: tl.constexpr,
    tile,
):
    """b_y[m] + scale·s[m]·b of row m's own slot [BM, BN]; b_y itself in rows without an adapter.

    A rank at a time: every row reads its own row of its own page, so that of B nothing is asked for
    but what is needed, whatever the mix, and a row is the same in any company. UNROLL: ranks whose
    loads are under way together. p_thresholds: the parts of s still lack the factor of x's mask.
    """
    BM: tl.constexpr = tile.BM
    BN: tl.constexpr = tile.BN
    o_m = m0 + tl.arange(0, BM)
    o_n = n0 + tl.arange(0, BN)
    m_m = o_m < M
    b_slot = tl.load(p_slots + o_m, mask=m_m, other=-1)  # [BM]
    m_slot = (b_slot >= 0) & (b_slot < pages.S)
    b_rank = tl.load(pages.ranks + b_slot, mask=m_slot, other=0)
    b_rank = tl.minimum(b_rank, pages.C * PAGE)
    m_own = b_rank > 0
    most = tl.max(b_rank, axis=0)
    if most > 0:
        p_own = pages.table + b_slot.to(tl.int64) * pages.C  # [BM]
        p_sums = s.p + o_m.to(tl.int64) * s.row  # [BM]
        if p_thresholds is not None:
            b_dropped = tl.load(p_thresholds + b_slot, mask=m_slot, other=0)
            b_whole = tl.full([BM], 65536.0, tl.float32)
            b_kept = tl.math.div_rn(b_whole, (65536 - b_dropped).to(tl.float32))
        b_z = tl.full([BM, BN], 0.0, tl.float32)  # [BM, BN]
        for c in range(0, tl.cdiv(most, PAGE)):
            b_page = tl.load(p_own + c, mask=b_rank > c * PAGE, other=0)  # [BM]
            p_page = pages.p + b_page.to(tl.int64)[:, None] * (PAGE * N) + o_n[None, :]
            for j in tl.range(0, PAGE, num_stages=1, loop_unroll_factor=UNROLL):
                m_j = b_rank > c * PAGE + j
                b_s = tl.full([BM], 0.0, tl.float32)  # [BM]
                for part in tl.static_range(PARTS):
                    p_part = p_sums + part * s.part + c * PAGE + j
                    b_s += tl.load(p_part, mask=m_j, other=0.0).to(tl.float32)
                if p_thresholds is not None:
                    b_s *= b_kept
                b_s = rank_value(b_s, DTYPE)
                if keep.p is not None:
                    if n0 == 0:
                        o_keep = o_m.to(tl.int64) * keep.row + c * PAGE + j
                        tl.store(keep.p + o_keep, b_s, mask=m_j)
                m_b = m_j[:, None] & (o_n < N)[None, :]
                b_b = tl.load(p_page + j * N, mask=m_b, other=0.0)  # [BM, BN]
                b_b = cast(b_b.to(tl.float32), DTYPE).to(tl.float32)
                b_z += b_s.to(tl.float32)[:, None] * b_b
        b_scale = tl.load(pages.scales + b_slot, mask=m_own, other=0.0)  # [BM]
        b_y = tl.where(m_own[:, None], b_y + b_z * b_scale[:, None], b_y)
    return b_y


@triton.jit
def _gather_gemm_kernel(
    x,
    y,
    s,
    pages,
    keep,
    bias,
    p_slots,
    p_thresholds,
    M,
    N,
    K,
    programs,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    tile,
    base,
):
    """y = x·w + scale·s·b + bias, b that of each row's own slot; tiles as in `_lora_gemm_kernel`
    without its branch, so that a row of no adapter is what that gives, bit for bit.

    Shapes: x[M, K] w[K, N] y[M, N] b[P, 16, N] s[M, ..] in PARTS parts of `size` elements, bias[N],
        slots[M] pages[S, C]; thresholds[S] where the parts still lack the factor of x's mask. keep
        takes s, rounded.
    Grid: [programs], each walking tiles of y in steps of `programs`. Shrunk in fp32.
    """
    DTYPE: tl.constexpr = y.p.dtype.element_ty
    tiles_m = tl.cdiv(M, tile.BM)
    tiles_n = tl.cdiv(N, tile.BN)
    first = tl.program_id(0)
    end = tiles_m * tiles_n
    step = programs
    if not tile.TMA:  # one tile a program
        end = first + 1
        step = 1
    for at in tl.range(first, end, step):
        pid_m, pid_n = grouped_tile(at, tiles_m, tiles_n, tile.GROUP)
        m0 = pid_m * tile.BM
        n0 = pid_n * tile.BN
        b_y = tl.full([tile.BM, tile.BN], 0.0, tl.float32)  # [BM, BN]
        b_none = tl.full([tile.BM, 16], 0.0, tl.float32)  # [BM, 16]
        b_y, b_none = product_tile(
            b_y, b_none, x, base, None, None, m0, n0, M, N, K, False, False, tile
        )
        b_y = _own_rows_tile(
            b_y, s, pages, keep, p_slots, p_thresholds, m0, n0, M, N, PARTS, UNROLL, DTYPE, tile
        )
        store_tile(b_y, y, bias, m0, n0, M, N, tile)


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
        s: [T, ..], or fp32 parts [split_k, T, ..].
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
        x=left(x, config),
        y=matrix(y),
        s=shrunk(s),
        pages=rank_pages(p, p.b),
        keep=matrix(keep),
        bias=vector(bias),
        p_slots=entries.slots,
        p_thresholds=None if late is None else late.thresholds,
        M=m,
        N=n,
        K=k,
        programs=programs,
        PARTS=s.shape[0] if s.dim() == 3 else 1,
        UNROLL=max(1, min(16, _IN_FLIGHT * 32 * config.warps // (config.block_m * config.block_n))),
        tile=tile(config, x, block_r=16, even_k=k % config.block_k == 0),
        base=w.args(config, backward=False),
    )
