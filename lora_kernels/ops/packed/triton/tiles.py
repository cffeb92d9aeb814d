"""What the products of packed projections are made of: the arguments of one of three, picked."""

import triton
import triton.language as tl

from lora_kernels.ops.common.triton.arguments import Adapter, Base, Mask, Matrix
from lora_kernels.ops.common.triton.lora_tiles import branch_tile, own_branch_tile, product_tile
from lora_kernels.ops.common.triton.pick import pick, pick_given


@triton.jit
def pick_pointer(which, p_0, p_1, p_2, DESCRIPTOR: tl.constexpr):
    """p_which of pointers, or of descriptors of one box."""
    if DESCRIPTOR:
        p = p_0
        if which == 1:
            p = p_1
        if which == 2:
            p = p_2
    else:
        p = pick(which, p_0, p_1, p_2)
    return p


@triton.jit
def pick_matrix(which, m_0, m_1, m_2, DESCRIPTOR: tl.constexpr):
    """m_which of pointers, or of descriptors of one box."""
    p = pick_pointer(which, m_0.p, m_1.p, m_2.p, DESCRIPTOR)
    return Matrix(p, pick(which, m_0.row, m_1.row, m_2.row), pick(which, m_0.col, m_1.col, m_2.col))


@triton.jit
def packed_product_tile(
    b_y,
    b_s,
    i,
    x,
    bases,
    q,
    R,
    mask,
    m0,
    n0,
    M,
    N,
    K,
    OWN_BRANCH: tl.constexpr,
    BACKWARD: tl.constexpr,
    tile,
):
    """`product_tile` over base i of three, of one format, with q [K, R] and projection i's mask."""
    DENSE_TMA: tl.constexpr = tile.TMA and bases[0].CHUNK == 0
    return product_tile(
        b_y,
        b_s,
        x,
        Base(
            pick_pointer(i, bases[0].w, bases[1].w, bases[2].w, DENSE_TMA),
            pick(i, bases[0].w_row, bases[1].w_row, bases[2].w_row),
            pick(i, bases[0].w_col, bases[1].w_col, bases[2].w_col),
            pick_given(i, bases[0].absmax, bases[1].absmax, bases[2].absmax),
            pick_given(i, bases[0].nested, bases[1].nested, bases[2].nested),
            pick_given(i, bases[0].map, bases[1].map, bases[2].map),
            pick_given(i, bases[0].offset, bases[1].offset, bases[2].offset),
            bases[0].table,
            bases[0].CHUNK,
            bases[0].BLOCK,
            bases[0].NESTED,
        ),
        Adapter(q.p, q.row, q.col, None, 1, 1, None, 1, None, 1, R, None),
        Mask(mask.seed, mask.threshold, mask.stream + i, mask.keep_scale, mask.DROPOUT),
        m0,
        n0,
        M,
        N,
        K,
        OWN_BRANCH,
        BACKWARD,
        tile,
    )


@triton.jit
def packed_own_branch_tile(
    b_y,
    b_s,
    i,
    t,
    u,
    R,
    scale,
    mask,
    m0,
    n0,
    M,
    N,
    BACKWARD: tl.constexpr,
    DTYPE: tl.constexpr,
    tile,
):
    """`own_branch_tile` with u [R, N] and projection i's mask."""
    return own_branch_tile(
        b_y,
        b_s,
        t,
        Adapter(None, 1, 1, u.p, u.row, u.col, None, 1, None, 1, R, scale),
        Mask(mask.seed, mask.threshold, mask.stream + i, mask.keep_scale, mask.DROPOUT),
        m0,
        n0,
        M,
        N,
        BACKWARD,
        DTYPE,
        tile,
    )


@triton.jit
def packed_branch_tile(b_y, t, u, R, factor, m0, n0, M, N, DTYPE: tl.constexpr, tile):
    """`branch_tile` with u [R, N]."""
    return branch_tile(
        b_y,
        t,
        Adapter(None, 1, 1, u.p, u.row, u.col, None, 1, None, 1, R, None),
        factor,
        m0,
        n0,
        M,
        N,
        DTYPE,
        tile,
    )
