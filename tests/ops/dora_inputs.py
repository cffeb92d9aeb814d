"""Inputs of the DoRA ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.rank import rank_value
from lora_kernels.ops.lora.reference import drop
from lora_kernels.ops.nf4.reference import dense_weight
from tests.ops.case import (
    ANY,
    BASES,
    DTYPES,
    RANGES,
    WIDE_BASES,
    WIDE_SHAPES,
    Case,
    Range,
    Source,
    dtype_name,
    size_name,
    strided,
)

# M, N, K, R: single rows and columns, no rows, outputs or inputs, K that is no multiple of 8.
SHAPES = (
    (0, 16, 24, 3),
    (5, 0, 24, 3),
    (5, 16, 0, 3),
    (1, 64, 128, 16),
    (7, 20, 31, 1),
    (33, 129, 257, 17),
    (65, 1, 40, 3),
    (5, 33, 1, 2),
)
SMALL = (5, 12, 20, 3)
SCALE = 0.75


@dataclass(frozen=True)
class Options:
    """What a DoRA call may have besides x, W, A, B and the magnitude.

    `keep_u` is whether the magnitude learns. `rows` makes some rows special: "zero" have norm 0,
    "flat" have magnitude 0 or a tiny m̂.
    """

    bias: bool = False
    dropout_p: float = 0.0
    adapter_dtype: torch.dtype | None = None
    strides: str = ""
    keep_u: bool = True
    rows: str = ""
    needs: tuple[bool, ...] | None = None
    range: Range = ANY


FP32 = torch.float32
OPTIONS = {
    "plain": Options(),
    "bias": Options(bias=True),
    "dropout": Options(dropout_p=0.25),
    "fp32-adapters": Options(adapter_dtype=FP32),
    "all": Options(True, 0.5, FP32),
}
SPECIAL = {
    "zero-rows": Options(rows="zero"),
    "zero-rows-all": Options(True, 0.5, FP32, rows="zero"),
    "flat-rows": Options(rows="flat"),
    "flat-rows-all": Options(True, 0.5, FP32, rows="flat"),
    "kept-nothing": Options(keep_u=False),
    "kept-nothing-all": Options(True, 0.5, FP32, keep_u=False),
    "transposed": Options(True, 0.25, strides="transposed"),
    "padded-rows": Options(strides="padded-rows"),
}

WIDE = {
    f"{name}-{kind}": replace(o, range=of)
    for name, of in (RANGES | {"wide-z": Range(x=2.0**5, w=2.0**12, magnitude=2.0**-7)}).items()
    for kind, o in OPTIONS.items()
    if name != "wide-z" or not o.dropout_p  # x − drop(x) meets no magnitude
}

Call = tuple[tuple[int, int, int, int], torch.dtype, str, Options]


def _base(r: Source, call: Call, adapters: torch.dtype) -> tuple[Any, ...]:
    """base, meta, a, b"""
    (_, n, k, rank), dtype, name, o = call
    base, meta = r.base(name, n, k, dtype, o.range.w)
    a = r.normal(rank, k, dtype=adapters, std=o.range.a * max(k, 1) ** -0.5)
    b = r.normal(n, rank, dtype=adapters, std=o.range.b * rank**-0.5)
    if o.rows == "zero":  # of W and B; and W = −cBA exactly, in whole numbers
        b[::3] = 0
        if len(base) == 1:
            base[0][::3] = 0
            a[0] = a[0].sign()
            b[1] = 0
            b[1, 0] = 4
            base[0][1] = -SCALE * 4 * a[0].to(dtype)
    return base, meta, a, b


def _norm(base: list[Tensor], meta: list[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """‖W‖² and ‖W + cBA‖ of every row, in fp32."""
    w = dense_weight(base, meta, FP32).double()
    total = w + SCALE * (b.double() @ a.double())
    return w.square().sum(1).float(), total.square().sum(1).sqrt().float()


def dora_norm() -> Iterator[Case]:
    def make(r: Source, call: Call) -> tuple[Any, ...]:
        base, meta, a, b = _base(r, call, call[3].adapter_dtype or call[1])
        own = None if not call[3].keep_u else _norm(base, meta, a, b)[0]
        return own, base, meta, a, b, SCALE

    plain, mixed = OPTIONS["plain"], OPTIONS["fp32-adapters"]
    for dtype, shape, base, o in itertools.product(DTYPES, SHAPES, BASES, (plain, mixed)):
        name = "-fp32-adapters" if o is mixed else ""
        yield Case(
            "dora_norm",
            f"{dtype_name(dtype)}-{size_name(*shape[1:])}-{base}{name}",
            lambda r, c=(shape, dtype, base, o): make(r, c),
        )
    for dtype, base, name in itertools.product(DTYPES, BASES, ("zero-rows", "kept-nothing")):
        yield Case(
            "dora_norm",
            f"{dtype_name(dtype)}-{size_name(*SMALL[1:])}-{base}-{name}",
            lambda r, c=(SMALL, dtype, base, SPECIAL[name]): make(r, c),
            core=dtype is not torch.float16 and base in ("dense", "nf4-nested"),
        )


def _calls() -> Iterator[tuple[str, Call, bool]]:
    for dtype, shape, (name, o) in itertools.product(DTYPES, SHAPES, OPTIONS.items()):
        yield f"{dtype_name(dtype)}-{size_name(*shape)}-{name}", (shape, dtype, "dense", o), False
    for dtype, base, (name, o) in itertools.product(DTYPES, BASES, (OPTIONS | SPECIAL).items()):
        if base != "dense" and name.startswith("zero-rows") and dtype is not FP32:
            continue  # a 4-bit row of zeros is one like any other
        core = dtype is FP32 and base in ("dense", "nf4-nested") and name in ("plain", "all")
        label = f"{dtype_name(dtype)}-{size_name(*SMALL)}-{base}-{name}"
        yield label, (SMALL, dtype, base, o), core
    for shape, base, (name, o) in itertools.product(WIDE_SHAPES, WIDE_BASES, WIDE.items()):
        label = f"float16-{size_name(*shape)}-{base}-{name}"
        yield label, (shape, torch.float16, base, o), False
    for shape in SHAPES:
        label = f"bfloat16-{size_name(*shape)}-nf4-nested-all"
        yield label, (shape, torch.bfloat16, "nf4-nested", OPTIONS["all"]), False


def _arguments(r: Source, call: Call) -> dict[str, Any]:
    (m, n, k, _), dtype, _, o = call
    adapters = o.adapter_dtype or dtype
    x = r.normal(m, k, dtype=dtype, std=o.range.x)
    base, meta, a, b = _base(r, call, adapters)
    norm = _norm(base, meta, a, b)[1]
    magnitude = norm * (1 + r.normal(n, std=0.25)) * o.range.magnitude
    if o.rows == "flat":
        magnitude[::3], magnitude[1] = 0, magnitude[1] * 1e-5
    return {
        "x": strided(x, o.strides) if o.strides not in ("", "expanded") else x,
        "base": base,
        "meta": meta,
        "a": a,
        "b": b,
        "scale": SCALE,
        "magnitude": magnitude.to(adapters),
        "norm": norm,
        "bias": r.normal(n, dtype=dtype) if o.bias else None,
        "dropout_p": o.dropout_p,
        "seed": torch.tensor([-1234567890123456789]) if o.dropout_p else None,
    }


def dora_linear_fwd() -> Iterator[Case]:
    for label, call, core in _calls():
        keep_u = call[3].keep_u
        yield Case(
            "dora_linear_fwd",
            label,
            lambda r, c=call, u=keep_u: (*_arguments(r, c).values(), u),
            core=core,
        )


def dora_linear_bwd() -> Iterator[Case]:
    def make(r: Source, call: Call) -> tuple[Any, ...]:
        o = call[3]
        t = _arguments(r, call)
        x, base, meta, a = (t[k] for k in ("x", "base", "meta", "a"))
        dy = r.normal(x.shape[0], meta[0], dtype=x.dtype, std=o.range.dy)
        dy = strided(dy, o.strides) if o.strides and dy.numel() else dy
        s = rank_value(drop(x.float(), o.dropout_p, t["seed"]) @ a.float().T, x.dtype)
        u = r.normal(x.shape[0], meta[0], dtype=x.dtype) if o.keep_u else None
        needs = o.needs or (True, True, True, o.keep_u, o.bias, len(base) == 1)
        bias, p, seed = (t.pop(k) for k in ("bias", "dropout_p", "seed"))
        assert (bias is not None) == o.bias
        return dy, t.pop("x"), s, *t.values(), p, seed, u, list(needs)

    for label, call, core in _calls():
        yield Case("dora_linear_bwd", label, lambda r, c=call: make(r, c), core=core)
    for i, p in itertools.product(range(6), (0.0, 0.1)):  # one gradient at a time
        o = Options(True, p, needs=tuple(j == i for j in range(6)))
        yield Case(
            "dora_linear_bwd",
            f"needs-only-{i}-p{p}",
            lambda r, c=(SMALL, FP32, "dense", o): make(r, c),
            core=True,
        )
    o = Options(strides="expanded")
    yield Case(
        "dora_linear_bwd",
        "dy-expanded",
        lambda r, c=(SMALL, FP32, "dense", o): make(r, c),
        core=True,
    )
