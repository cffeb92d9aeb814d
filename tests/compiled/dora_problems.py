"""Calls of the DoRA kernels for `problems.py`: a problem's rank_diag stands for rows that are
special, since DoRA has no diagonals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.ops.common.rank import rank_value
from lora_kernels.ops.lora.reference import drop
from lora_kernels.ops.nf4.reference import dense_weight
from tests.compiled.problems import FP16, FP32, Problem, both
from tests.ops.case import Source, strided

SCALE = 0.75


@dataclass(frozen=True)
class Quantised(Problem):
    """A call over a 4-bit W of a kind in `tests.ops.case.BASES`."""

    base: str = "nf4-nested"
    strategies: tuple[str | None, ...] = (None,)


# Nested and plain scales, K of whole chunks, of half ones (a block straddles rows) and odd.
QUANTISED = (
    Quantised(
        "nf4-nested",
        (70, 136, 192, 16),
        both("64x64x64 w4 s3", "64x64x64 w4 s4", tma=True),
        dropout=0.1,
        bias=True,
    ),
    Quantised(
        "nf4-straddling",
        (33, 65, 96, 12),
        both("64x64x64 w4 s3", "64x64x64 w4 s3"),
        FP16,
        FP32,
        base="nf4",
    ),
    Quantised(
        "fp4-odd-rows",
        (7, 33, 41, 3),
        both("16x16x32 w2 s2", "16x16x32 w2 s2"),
        adapter=FP32,
        dropout=0.3,
        rank_diag=True,
        base="fp4-nested-b32",
    ),
    Quantised("nf4-decode", (1, 72, 128, 8), both("16x32x128 w4 s4", "16x64x128 w4 s4")),
    Quantised(
        "nf4-whole-tiles",
        (128, 128, 256, 16),
        both("128x128x32 w8 s4", "128x128x64 w8 s4", tma=True),
        dropout=0.1,
        slow=True,
    ),
    Quantised(
        "nf4-whole-tiles-plain",
        (128, 128, 256, 16),
        both("128x128x64 w8 s2", "128x128x64 w8 s4", tma=True),
        slow=True,
    ),
)


def _arguments(p: Problem, r: Source) -> dict[str, Any]:
    """What the three ops take, by name; the norm is the right one, rounded to fp32."""
    m, n, k, rank = p.shape
    x = r.normal(m, k, dtype=p.dtype, std=p.range.x)
    base, meta = r.base(p.base if isinstance(p, Quantised) else "dense", n, k, p.dtype)
    a = r.normal(rank, k, dtype=p.adapter, std=p.range.a * k**-0.5)
    b = r.normal(n, rank, dtype=p.adapter, std=p.range.b * rank**-0.5)
    if p.rank_diag:  # rows without a norm
        b[::5] = 0
        if len(base) == 1:
            base[0][::5] = 0
    total = dense_weight(base, meta, FP32).double() + SCALE * (b.double() @ a.double())
    norm = torch.linalg.vector_norm(total, dim=1).float()
    magnitude = norm * (1 + r.normal(n, std=0.25))
    if p.rank_diag or not p.bias:  # and rows of no magnitude
        magnitude[1::7] = 0
        magnitude[2:3] *= 1e-5
    return {
        "x": strided(x, p.strides) if p.strides else x,
        "base": base,
        "meta": meta,
        "a": a,
        "b": b,
        "scale": SCALE,
        "magnitude": magnitude.to(p.adapter),
        "norm": norm,
        "bias": r.normal(n, dtype=p.dtype) if p.bias else None,
        "dropout_p": p.dropout,
        "seed": torch.tensor([-1234567890123456789]) if p.dropout else None,
    }


def _norm(p: Problem, r: Source) -> tuple[Any, ...]:
    t = _arguments(p, r)
    return None, t["base"], t["meta"], t["a"], t["b"], SCALE


def _forward(p: Problem, r: Source) -> tuple[Any, ...]:
    return *_arguments(p, r).values(), _learns(p)


def _backward(p: Problem, r: Source) -> tuple[Any, ...]:
    t = _arguments(p, r)
    x, n = t["x"], t["meta"][0]
    bias, dropout, seed = (t.pop(name) for name in ("bias", "dropout_p", "seed"))
    dy = r.normal(x.shape[0], n, dtype=p.dtype, std=p.range.dy)
    dy = strided(dy, p.strides) if p.strides else dy
    s = rank_value(drop(x.float(), dropout, seed) @ t["a"].float().T, p.dtype)
    u = r.normal(x.shape[0], n, dtype=p.dtype) if _learns(p) else None
    needs = list(p.needs or (True, True, True, _learns(p), bias is not None, False))[:6]
    return dy, t.pop("x"), s, *t.values(), dropout, seed, u, needs


def _learns(p: Problem) -> bool:
    """Whether the magnitude does, so that the forward keeps u."""
    return not p.rank_diag or p.out_diag


MAKERS: dict[str, Callable[[Problem, Source], tuple[Any, ...]]] = {
    "dora_norm": _norm,
    "dora_linear_fwd": _forward,
    "dora_linear_bwd": _backward,
}
