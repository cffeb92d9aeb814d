"""Arguments of the packed LoRA ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.rank import rank_value
from lora_kernels.ops.packed.schema import META
from tools.op_inputs.source import ANY, BF16, Range, Source, strided

SCALES = (0.75, 2.0, -0.5, 1.25)


@dataclass(frozen=True)
class Packed:
    """A call on one to four projections of one x.

    Attributes:
        n, r, bases, bias: of each projection; bases are dense and without a bias where not given.
        needs: positions of the gradients asked for; None is every one of what there is, those of
            dense weights if `grad_base`.
    """

    m: int = 7
    k: int = 20
    n: tuple[int, ...] = (64, 24, 8)
    r: tuple[int, ...] = (1, 3, 16)
    dtype: torch.dtype = BF16
    adapter: torch.dtype | None = None
    bases: tuple[str, ...] = ()
    bias: tuple[bool, ...] = ()
    dropout: float = 0.0
    strides: str = ""
    needs: tuple[int, ...] | None = None
    grad_base: bool = False
    scales: tuple[float, ...] = SCALES
    range: Range = ANY


def forward(c: Packed, r: Source) -> tuple[Any, ...]:
    """x, base, meta, a, b, scales, bias, dropout_p, seed"""
    adapter, p = c.adapter or c.dtype, len(c.n)
    x = strided(r.normal(c.m, c.k, dtype=c.dtype, std=c.range.x), c.strides)
    base: list[Tensor] = []
    meta: list[int] = []
    for kind, n in zip(c.bases or ("dense",) * p, c.n, strict=True):
        tensors, sizes = r.base(kind, n, c.k, c.dtype)
        base += tensors
        meta += [*sizes, *[0] * (META - len(sizes))]
    a = [r.weight(rank, c.k, adapter, c.range.a) for rank in c.r]
    b = [r.weight(n, rank, adapter, c.range.b) for n, rank in zip(c.n, c.r, strict=True)]
    with_bias = zip(c.n, c.bias or (False,) * p, strict=True)
    bias = [r.normal(n, dtype=c.dtype) if has else None for n, has in with_bias]
    seed = r.seed() if c.dropout else None
    return x, base, meta, a, b, list(c.scales[:p]), bias, c.dropout, seed


def backward(c: Packed, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, a, b, scales, dropout_p, seed, needs"""
    made = forward(c, r)
    dy = [r.normal(c.m, n, dtype=c.dtype, std=c.range.dy) for n in c.n]
    s = rank_value(r.normal(c.m, sum(c.r), std=c.range.s), c.dtype)
    return backward_of(made, [strided(t, c.strides) for t in dy], s, c)


def backward_of(
    made: Sequence[Any], dy: list[Tensor], s: Tensor, c: Packed = Packed()
) -> tuple[Any, ...]:
    """The backward after a forward of these arguments that gave s."""
    x, base, meta, a, b, scales, bias, p, seed = made
    count = len(a)
    weights = [c.grad_base and kind == "dense" for kind in c.bases or ("dense",) * count]
    needs = [True] * (1 + 2 * count) + [t is not None for t in bias] + weights
    if c.needs is not None:
        needs = [i in c.needs for i in range(len(needs))]
    return dy, x, s, base, meta, a, b, scales, p, seed, needs
