"""Launches of up to three projections: which, and how the kernels choose among their arguments.

A kernel takes a group of arguments for each projection and picks one of the three at run time. Its
code then has one body, with the registers and the shared memory of one projection. It picks inside
a loop or a branch: outside, LLVM would pick among the parameters' addresses, in local memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TypeVar

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.arguments import Matrix
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.packed.schema import split_base

PER_LAUNCH = 3  # projections
T = TypeVar("T")


def split_weights(base: Sequence[Tensor], meta: Sequence[int]) -> list[Weight]:
    """Each projection's weight."""
    return [Weight(own, m) for own, m, _ in split_base(base, meta)]


def groups(weights: Sequence[Weight]) -> Iterator[range]:
    """The projections of each launch: neighbours whose weights are of one format, so that a
    kernel is compiled for it."""
    first = 0
    for i in range(1, len(weights) + 1):
        full = i == len(weights) or i - first == PER_LAUNCH
        if full or weights[i].meta[2:] != weights[first].meta[2:]:
            yield range(first, i)
            first = i


def three(values: Sequence[T], absent: T | None = None) -> tuple[T, ...]:
    """Each projection's arguments; what is not there is `absent`, or the first once more, where it
    is never picked."""
    return (*values, *[values[0] if absent is None else absent] * (PER_LAUNCH - len(values)))


def ends(widths: Sequence[int], block: int) -> list[int]:
    """Where each projection's blocks end, those of all counted through."""
    found = [ceil(n / block) for n in widths]
    return [sum(found[: i + 1]) for i in range(PER_LAUNCH)]


@triton.jit
def pick(which, v_0, v_1, v_2):
    """v_which."""
    return tl.where(which == 0, v_0, tl.where(which == 1, v_1, v_2))


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
def pick_given(which, p_0, p_1, p_2):
    """p_which of pointers, or None of none."""
    picked = p_0
    if p_0 is not None:
        picked = pick(which, p_0, p_1, p_2)
    return picked
