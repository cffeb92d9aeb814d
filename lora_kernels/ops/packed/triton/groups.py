"""Launches of up to three projections: which, and how the kernels name their arguments.

A kernel takes its arguments as name_0, name_1 and name_2, and picks: it is then one body, with the
registers and the shared memory of one projection. It picks within a loop or a branch, because
before those LLVM would pick among the parameters' own addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.packed.schema import split_base

PER_LAUNCH = 3  # projections
# Arguments of a weight that those of one launch share.
_FORMAT = ("p_table", "CHUNK", "BLOCK", "NESTED")


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


def weight_args(
    weights: Sequence[Weight], config: GemmConfig, backward: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a launch takes of its weights: what they share, and what each has of its own."""
    found = [w.args(config, backward) for w in weights]
    shared = {name: found[0].pop(name) for name in _FORMAT}
    for own in found[1:]:
        for name in _FORMAT:
            del own[name]
    return shared, found


def numbered(
    values: Sequence[dict[str, object]], absent: dict[str, object] | None = None
) -> dict[str, Any]:
    """Each projection's arguments by the kernels' names; what is not there is `absent`, or the
    first once more, where it is never picked."""
    slots = [*values, *([absent or values[0]] * (PER_LAUNCH - len(values)))]
    return {f"{name}_{i}": v for i, slot in enumerate(slots) for name, v in slot.items()}


def ends(widths: Sequence[int], block: int) -> list[int]:
    """Where each projection's blocks end, those of all counted through."""
    found = [ceil(n / block) for n in widths]
    return [sum(found[: i + 1]) for i in range(PER_LAUNCH)]


@triton.jit
def pick(which, v_0, v_1, v_2):
    """v_which."""
    return tl.where(which == 0, v_0, tl.where(which == 1, v_1, v_2))


@triton.jit
def pick_matrix(which, m_0, m_1, m_2, TMA: tl.constexpr):
    """m_which of pointers, or of descriptors of one box."""
    if TMA:
        matrix = m_0
        if which == 1:
            matrix = m_1
        if which == 2:
            matrix = m_2
    else:
        matrix = pick(which, m_0, m_1, m_2)
    return matrix


@triton.jit
def pick_given(which, p_0, p_1, p_2):
    """p_which of pointers, or None of none."""
    picked = p_0
    if p_0 is not None:
        picked = pick(which, p_0, p_1, p_2)
    return picked
