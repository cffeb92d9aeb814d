"""Calls of the DoRA kernels for `problems.py`: a problem's rank_diag stands for rows that are
special, its out_diag for a z that is kept, since DoRA has no diagonals."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lora_kernels.ops.dora.magnitude import output_scale
from lora_kernels.ops.lora.reference import drop
from tests.ops.case import Source, strided

if TYPE_CHECKING:
    from tests.compiled.problems import Problem

SCALE = 0.75


def _arguments(p: Problem, r: Source) -> dict[str, Any]:
    """What the three ops take, by name; the norm is the right one, rounded to fp32."""
    m, n, k, rank = p.shape
    x = r.normal(m, k, dtype=p.dtype)
    w = r.normal(n, k, dtype=p.dtype, std=k**-0.5)
    a = r.normal(rank, k, dtype=p.adapter, std=k**-0.5)
    b = r.normal(n, rank, dtype=p.adapter, std=rank**-0.5)
    if p.rank_diag:  # rows without a norm
        w[::5], b[::5] = 0, 0
    norm = torch.linalg.vector_norm(w.double() + SCALE * (b.double() @ a.double()), dim=1).float()
    magnitude = norm * (1 + r.normal(n, std=0.25))
    if p.rank_diag or not p.bias:  # and rows that leave nothing of z in y
        magnitude[1::7] = 0
        magnitude[2:3] *= 1e-5
    return {
        "x": strided(x, p.strides) if p.strides else x,
        "base": [w],
        "meta": [n, k],
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
    return *_arguments(p, r).values(), _kept(p) == "z"


def _backward(p: Problem, r: Source) -> tuple[Any, ...]:
    t = _arguments(p, r)
    x, (w,), b = t["x"], t["base"], t["b"]
    bias, dropout, seed = (t.pop(name) for name in ("bias", "dropout_p", "seed"))
    dy = r.normal(x.shape[0], w.shape[0], dtype=p.dtype)
    dy = strided(dy, p.strides) if p.strides else dy
    s = (drop(x.float(), dropout, seed) @ t["a"].float().T).to(p.dtype)
    # What a forward would have kept: z here is any, y goes with x, s and m̂.
    z = r.normal(x.shape[0], w.shape[0], dtype=p.dtype)
    exact = x.float() @ w.float().T + SCALE * (s.float() @ b.float().T)
    y = (output_scale(t["magnitude"], t["norm"]) * exact).to(p.dtype)
    y, z = (v if _kept(p) == name else None for name, v in (("y", y), ("z", z)))
    needs = list(p.needs or (True, True, True, True, bias is not None, False))[:6]
    return dy, t.pop("x"), s, *t.values(), dropout, seed, y, z, needs


def _kept(p: Problem) -> str:
    """What the forward keeps for the magnitude's gradient; with rows of special kinds also
    nothing, so that z is made again from a masked x."""
    if not p.dropout and not p.bias:
        return "y"
    return "" if p.rank_diag and not p.out_diag else "z"


MAKERS: dict[str, Callable[[Problem, Source], tuple[Any, ...]]] = {
    "dora_norm": _norm,
    "dora_linear_fwd": _forward,
    "dora_linear_bwd": _backward,
}
