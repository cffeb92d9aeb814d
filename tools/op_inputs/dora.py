"""Arguments of the DoRA ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.lora.reference import drop
from lora_kernels.ops.nf4.reference import dense_weight
from tools.op_inputs.layer import Layer
from tools.op_inputs.source import FP32, Source


@dataclass(frozen=True)
class Dora(Layer):
    """A call with a magnitude, which has no diagonals.

    Attributes:
        keep_u: whether the magnitude learns, so that the forward keeps u.
        rows: words for rows that are special: "zero" have norm 0, "flat" magnitude 0 or a tiny m̂.
    """

    keep_u: bool = True
    rows: str = ""


def _layer(c: Dora, r: Source) -> tuple[list[Tensor], list[int], Tensor, Tensor]:
    """base, meta, a, b"""
    _, n, k, rank = c.shape
    base, meta = c.weight(r)
    a, b = r.adapter(n, k, rank, c.adapter_dtype, c.range)
    if "zero" in c.rows:  # of W and B; and W = −cBA exactly, in whole numbers
        b[::3] = 0
        if len(base) == 1:
            base[0][::3] = 0
            a[0] = a[0].sign()
            b[1] = 0
            b[1, 0] = 4
            base[0][1] = -c.scale * 4 * a[0].to(c.dtype)
    return base, meta, a, b


def _norms(c: Dora, base: list[Tensor], meta: list[int], a: Tensor, b: Tensor) -> list[Tensor]:
    """‖W‖² and ‖W + cBA‖ of every row, in fp32."""
    w = dense_weight(base, meta, FP32).double()
    total = w + c.scale * (b.double() @ a.double())
    return [w.square().sum(1).float(), total.square().sum(1).sqrt().float()]


def norm(c: Dora, r: Source) -> tuple[Any, ...]:
    """own, base, meta, a, b, scale; of a W whose own norms are known where anything is kept"""
    base, meta, a, b = _layer(c, r)
    own = _norms(c, base, meta, a, b)[0] if c.keep_u else None
    return own, base, meta, a, b, c.scale


def forward(c: Dora, r: Source) -> tuple[Any, ...]:
    """x, base, meta, a, b, scale, magnitude, norm, bias, dropout_p, seed, keep_u"""
    x = c.x(r)
    base, meta, a, b = _layer(c, r)
    norm = _norms(c, base, meta, a, b)[1]
    magnitude = norm * (1 + r.normal(c.shape[1], std=0.25)) * c.range.magnitude
    if "flat" in c.rows:
        magnitude[::3], magnitude[1] = 0, magnitude[1] * 1e-5
    magnitude = magnitude.to(c.adapter_dtype)
    bias = c.bias_of(r)
    return x, base, meta, a, b, c.scale, magnitude, norm, bias, *c.dropped(r), c.keep_u


def backward(c: Dora, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, a, b, scale, magnitude, norm, dropout_p, seed, u, needs"""
    x, base, meta, a, b, scale, magnitude, norm, bias, p, seed, _ = forward(c, r)
    dy = c.dy(r)
    u = r.normal(*dy.shape, dtype=x.dtype) if c.keep_u else None
    s = x.new_empty(c.shape[0], c.shape[3], dtype=rank_dtype(c.dtype))
    if not r.hollow:
        s = rank_value(drop(x.float(), p, seed) @ a.float().T, c.dtype)
    needs = c.needs or (*[True] * 3, c.keep_u, bias is not None, c.grad_base and len(base) == 1)
    return dy, x, s, base, meta, a, b, scale, magnitude, norm, p, seed, u, list(needs)
