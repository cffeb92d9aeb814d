"""Calls of the gated linear units: each activation, over whole blocks and a ragged end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.glu.schema import ACTIVATIONS
from tests.compiled.problems import BF16, FP16, FP32
from tools.op_inputs.source import Source, strided


@dataclass(frozen=True)
class Glu:
    """One call; `width` is g's standard deviation."""

    name: str
    size: tuple[int, int]
    activation: str
    dtype: torch.dtype = BF16
    width: float = 1.5
    strides: str = ""
    need_h: bool = False
    slow: bool = False
    tiles: dict[int, GemmConfig] = field(default_factory=dict)
    strategies: tuple[str | None, ...] = (None,)


PROBLEMS = (
    Glu("silu", (33, 70), "silu", need_h=True),
    Glu("gelu", (33, 70), "gelu"),
    Glu("gelu-tanh", (33, 70), "gelu_tanh", need_h=True),
    Glu("silu-wide-fp32", (3, 683), "silu", FP32, width=20.0),
    Glu("gelu-whole-fp32", (4, 512), "gelu", FP32, width=20.0, need_h=True),
    Glu("gelu-tanh-fp32", (3, 683), "gelu_tanh", FP32),
    Glu("silu-strided-fp16", (40, 31), "silu", FP16, strides="transposed", need_h=True),
)


def _tensors(p: Glu, r: Source, count: int) -> list[Tensor]:
    """g first."""
    values = [r.normal(*p.size, dtype=p.dtype, std=p.width if i == 0 else 1) for i in range(count)]
    return [strided(t, p.strides) for t in values] if p.strides else values


def _forward(p: Glu, r: Source) -> tuple[Any, ...]:
    g, u = _tensors(p, r, 2)
    return g, u, ACTIVATIONS.index(p.activation)


def _backward(p: Glu, r: Source) -> tuple[Any, ...]:
    g, u, dh = _tensors(p, r, 3)
    return dh, g, u, ACTIVATIONS.index(p.activation), p.need_h


MAKERS: dict[str, Callable[[Glu, Source], tuple[Any, ...]]] = {
    "glu_fwd": _forward,
    "glu_bwd": _backward,
}
