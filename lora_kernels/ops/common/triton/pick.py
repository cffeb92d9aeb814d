"""How a kernel of up to three projections chooses among their arguments.

It takes a group of arguments for each projection and picks one of the three at run time. Its code
then has one body, with the registers and the shared memory of one projection. It picks inside a
loop or a branch: outside, LLVM would pick among the parameters' addresses, in local memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TypeVar

import triton
import triton.language as tl

PER_LAUNCH = 3  # projections
T = TypeVar("T")


def three(values: Sequence[T]) -> tuple[T, ...]:
    """Each projection's arguments; where there is none the first's, which are never picked."""
    return (*values, *[values[0]] * (PER_LAUNCH - len(values)))


def ends(widths: Sequence[int], block: int) -> list[int]:
    """Where each projection's blocks end, those of all counted through."""
    found = [ceil(n / block) for n in widths]
    return [sum(found[: i + 1]) for i in range(PER_LAUNCH)]


@triton.jit
def pick(which, v_0, v_1, v_2):
    """v_which."""
    return tl.where(which == 0, v_0, tl.where(which == 1, v_1, v_2))


@triton.jit
def pick_given(which, p_0, p_1, p_2):
    """p_which of pointers, or None of none."""
    picked = p_0
    if p_0 is not None:
        picked = pick(which, p_0, p_1, p_2)
    return picked
