"""A labelled call of an op."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.op_inputs import arguments
from tools.op_inputs.source import Source


@dataclass(frozen=True)
class Case:
    """One labelled call of an op. `core` cases are the few that slow contract checks take."""

    op: str
    label: str
    make: Callable[[Source], tuple[Any, ...]]
    exact: bool = False
    core: bool = False

    def build(self, device: str = "cpu", draw: int = 0) -> tuple[Any, ...]:
        """The arguments; another `draw` has other values and the same metadata."""
        seed = zlib.crc32(f"{self.op}/{self.label}/{draw}".encode())
        return move(self.make(Source(seed)), device)


WIDE_SHAPES = ((5, 12, 20, 3), (33, 129, 257, 17))  # M, N, K, R
WIDE_BASES = ("dense", "nf4-nested")


def case_of(op: str, label: str, call: Any, *, exact: bool = False, core: bool = False) -> Case:
    """A case whose arguments are those of a call that `tools.op_inputs` knows."""
    return Case(op, label, lambda source: arguments(op, call, source), exact, core)


def move(value: Any, device: str) -> Any:
    """The arguments on another device, strides kept."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(move(v, device) for v in value)
    return value


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_name(*sizes: int) -> str:
    return "x".join(map(str, sizes))
