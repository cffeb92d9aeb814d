"""Arguments of the ops of one layer: LoRA's, and those over a 4-bit W without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.rank import rank_value
from tools.op_inputs.source import ANY, BF16, SEED, Format, Range, Shape, Source, strided


@dataclass(frozen=True)
class Layer:
    """A call on one layer.

    Attributes:
        shape: M, N, K, r.
        adapter: of A, B and the diagonals; None is `dtype`.
        base: a kind of W in `BASES`, or its format.
        strides: of x and dy; "expanded" is dy's alone.
        needs: the gradients asked for; None is every one of what there is, W's if `grad_base`.
    """

    shape: Shape
    dtype: torch.dtype = BF16
    adapter: torch.dtype | None = None
    base: str | Format = "dense"
    dropout: float = 0.0
    bias: bool = False
    rank_diag: bool = False
    out_diag: bool = False
    strides: str = ""
    needs: tuple[bool, ...] | None = None
    grad_base: bool = False
    stream: int = 0
    seed: int = SEED
    scale: float = 0.75
    range: Range = ANY

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self.adapter or self.dtype

    def x(self, r: Source) -> Tensor:
        m, _, k, _ = self.shape
        x = r.normal(m, k, dtype=self.dtype, std=self.range.x)
        return x if self.strides == "expanded" else strided(x, self.strides)

    def dy(self, r: Source) -> Tensor:
        m, n, _, _ = self.shape
        dy = r.normal(m, n, dtype=self.dtype, std=self.range.dy)
        return strided(dy, self.strides) if dy.numel() else dy

    def weight(self, r: Source) -> tuple[list[Tensor], list[int]]:
        _, n, k, _ = self.shape
        return r.base(self.base, n, k, self.dtype, self.range.w)

    def bias_of(self, r: Source) -> Tensor | None:
        return r.normal(self.shape[1], dtype=self.dtype) if self.bias else None

    def dropped(self, r: Source) -> tuple[float, Tensor | None]:
        return self.dropout, r.seed(self.seed) if self.dropout else None


def lora_forward(c: Layer, r: Source) -> tuple[Any, ...]:
    """x, base, meta, a, b, scale, bias, dropout_p, seed, rank_diag, out_diag, stream"""
    _, n, k, rank = c.shape
    return (
        c.x(r),
        *c.weight(r),
        *r.adapter(n, k, rank, c.adapter_dtype, c.range),
        c.scale,
        c.bias_of(r),
        *c.dropped(r),
        r.normal(rank, dtype=c.adapter_dtype) if c.rank_diag else None,
        r.normal(n, dtype=c.adapter_dtype) if c.out_diag else None,
        c.stream,
    )


def lora_backward(c: Layer, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, a, b, scale, dropout_p, seed, rank_diag, out_diag, needs, stream"""
    forward = lora_forward(c, r)
    dy = c.dy(r)
    s = rank_value(r.normal(c.shape[0], c.shape[3], std=c.range.s), c.dtype)
    return lora_backward_of(forward, dy, s, c)


def lora_backward_of(forward: Sequence[Any], dy: Tensor, s: Tensor, c: Layer) -> tuple[Any, ...]:
    """The backward after a forward of these arguments that gave s."""
    x, base, meta, a, b, scale, bias, *rest, stream = forward
    there = [t is not None for t in (bias, *rest[2:])]
    needs = c.needs or (True, True, True, *there, c.grad_base and len(base) == 1)
    return dy, x, s, base, meta, a, b, scale, *rest, list(needs), stream


def linear_forward(c: Layer, r: Source) -> tuple[Any, ...]:
    """x, base, meta, bias"""
    return c.x(r), *c.weight(r), c.bias_of(r)


def linear_backward(c: Layer, r: Source) -> tuple[Any, ...]:
    """dy, base, meta"""
    return c.dy(r), *c.weight(r)


@dataclass(frozen=True)
class Codec:
    """A 4-bit W [N, K] of a format, to quantise or to decode."""

    n: int
    k: int
    dtype: torch.dtype = BF16
    form: tuple[int, bool, str] = (64, True, "nf4")


def dequantize(c: Codec, r: Source) -> tuple[Any, ...]:
    """base, meta, dtype"""
    return *r.base(c.form, c.n, c.k, c.dtype), c.dtype


def quantize(c: Codec, r: Source) -> tuple[Any, ...]:
    """w, block size, quant_type"""
    block, _, quant_type = c.form
    return r.normal(c.n, c.k, dtype=c.dtype), block, ("nf4", "fp4").index(quant_type)


def quantize_scales(c: Codec, r: Source) -> tuple[Any, ...]:
    """absmax, map, offset, block size: as many scales as W has weights, and any map."""
    absmax, values = r.normal(c.n * c.k).abs(), torch.sort(r.normal(256)).values
    return absmax, values / values.abs().max(), absmax.mean().reshape(1), c.form[0]
