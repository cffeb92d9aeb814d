"""What the kernels take, in groups: Triton passes a NamedTuple like its members, one by one.

A member in capitals is known to the compiler (`tl.constexpr`), and so is None. A kernel makes a
group with such members within the call that takes it: where a group is given a name, Triton turns
its constants into numbers, and Triton 3.6 returns no None from a jitted function. Nor does 3.6 keep
the constants of a group within a group where there is a loop: the groups here are flat.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.launch import interpreting
from lora_kernels.ops.common.triton_host import Dropout, descriptor, precision


class Matrix(NamedTuple):
    """A pointer, or a tensor descriptor, and the strides of rows and columns."""

    p: Any
    row: Any
    col: Any


class Vector(NamedTuple):
    """A pointer, None where there is no such vector, and its stride."""

    p: Any
    step: Any


NO_MATRIX, NO_VECTOR = Matrix(None, 1, 1), Vector(None, 1)


class Mask(NamedTuple):
    """A dropout mask: see `philox.py`. `keep_scale` is the factor of what is kept."""

    seed: Any
    threshold: Any
    stream: Any
    keep_scale: Any
    DROPOUT: Any


class Base(NamedTuple):
    """A base weight as a product reads it, w [K, N] by its strides: itself, or where CHUNK > 0 its
    4-bit codes and what decodes them (`nf4_tiles.py`). So many codes of a row always share a scale;
    BLOCK and NESTED: how many share one, and how many of those share a nested one."""

    w: Any
    w_row: Any
    w_col: Any
    absmax: Any
    nested: Any
    map: Any
    offset: Any
    table: Any
    CHUNK: Any
    BLOCK: Any
    NESTED: Any


class Adapter(NamedTuple):
    """q [K, R] makes the rank-wide t = x·q, u [R, N] takes it to the output.

    Forward: q = Aᵀ, u = Bᵀ; of the gradient of x: q = B, u = A. `rank` [R] and `out` [N, or the
    rows of q] are the optional diagonals.
    """

    q: Any
    q_row: Any
    q_col: Any
    u: Any
    u_row: Any
    u_col: Any
    rank: Any
    rank_step: Any
    out: Any
    out_step: Any
    R: Any
    scale: Any


class Tile(NamedTuple):
    """How a product is cut: see `configs.GemmConfig`. BR: rank columns of a step. TMA: x, and a
    dense weight, are tensor descriptors. EVEN_K: BK divides K. HOLD_X: see `tiles.in_registers`."""

    BM: Any
    BN: Any
    BK: Any
    BR: Any
    GROUP: Any
    TMA: Any
    EVEN_K: Any
    HOLD_X: Any
    PRECISION: Any


@lru_cache(typed=True)
def constant(value: object) -> Any:
    """A value that the compiler knows, for a member of a group."""
    import triton.language as tl

    return tl.constexpr(value)


@lru_cache(1024)
def constants(group: Tile) -> Any:
    """A group of nothing else. The interpreter, which would make numbers of a tuple's members, gets
    them as they are."""
    if interpreting():
        return SimpleNamespace(**group._asdict())
    return type(group)(*map(constant, group))


def matrix(t: Tensor | None, *, transposed: bool = False) -> Matrix:
    if t is None:
        return NO_MATRIX
    row, col = t.stride()
    return Matrix(t, col, row) if transposed else Matrix(t, row, col)


def vector(t: Tensor | None) -> Vector:
    return NO_VECTOR if t is None else Vector(t, t.stride(0))


def mask(dropout: Dropout) -> Mask:
    d = dropout
    return Mask(d.seed, d.threshold, d.stream, d.keep_scale, constant(d.on))


def left(x: Tensor, config: GemmConfig) -> Matrix:
    """The left side of a product that is cut as in config."""
    if config.tma:
        return Matrix(descriptor(x, [config.block_m, config.block_k]), 0, 0)
    return matrix(x)


def tile(config: GemmConfig, x: Tensor, *, block_r: int, even_k: bool, hold_x: bool = False) -> Any:
    """The tile of config for a product of x."""
    c = config
    sizes = (c.block_m, c.block_n, c.block_k, block_r, c.group, c.tma, even_k, hold_x)
    return constants(Tile(*sizes, precision(x.dtype)))
