"""Arguments of the gated linear units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.glu.schema import ACTIVATIONS
from tools.op_inputs.source import BF16, Source, strided


@dataclass(frozen=True)
class Glu:
    """A call on g and u of a size; `width` is g's standard deviation."""

    size: tuple[int, int]
    activation: str = "silu"
    dtype: torch.dtype = BF16
    width: float = 1.5
    strides: str = ""
    need_h: bool = False


def _tensors(c: Glu, r: Source, count: int) -> list[Tensor]:
    """g first."""
    drawn = [r.normal(*c.size, dtype=c.dtype, std=c.width if i == 0 else 1) for i in range(count)]
    return [strided(t, c.strides) for t in drawn]


def forward(c: Glu, r: Source) -> tuple[Any, ...]:
    """g, u, activation"""
    return *_tensors(c, r, 2), ACTIVATIONS.index(c.activation)


def backward(c: Glu, r: Source) -> tuple[Any, ...]:
    """dh, g, u, activation, need_h"""
    g, u, dh = _tensors(c, r, 3)
    return dh, g, u, ACTIVATIONS.index(c.activation), c.need_h
