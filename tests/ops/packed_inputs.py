"""Inputs of the packed LoRA ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.rank import rank_value
from lora_kernels.ops.packed.schema import META
from tests.ops.case import ANY, DTYPES, RANGES, Case, Range, Source, dtype_name, strided

SEED = -1234567890123456789
SCALES = (0.75, 2.0, -0.5)


@dataclass(frozen=True)
class Packed:
    """A packed call: M, K, and for each projection its N, rank, kind of base and bias."""

    m: int = 7
    k: int = 20
    n: tuple[int, ...] = (64, 24, 8)
    r: tuple[int, ...] = (1, 3, 16)
    bases: tuple[str, ...] = ("dense",) * 3
    bias: tuple[bool, ...] = (True, False, True)
    dropout_p: float = 0.0
    adapter_dtype: torch.dtype | None = None
    strides: str = ""
    needs: tuple[int, ...] | None = None  # positions in `needs`
    range: Range = ANY


NF4 = ("nf4",) * 3
MIXED = ("nf4-nested", "dense", "fp4-nested-b32")
NESTED = ("nf4-nested",) * 3
FP32 = torch.float32
CALLS = {
    "plain": Packed(bias=(False,) * 3),
    "bias": Packed(),
    "dropout": Packed(dropout_p=0.3),
    "fp32-adapters": Packed(adapter_dtype=FP32),
    "nf4": Packed(bases=NF4, dropout_p=0.25, adapter_dtype=FP32),
    "nested": Packed(bases=NESTED, adapter_dtype=FP32),
    "mixed": Packed(bases=MIXED, dropout_p=0.5, adapter_dtype=FP32),
    "transposed": Packed(strides="transposed", dropout_p=0.3),
    "padded-rows": Packed(strides="padded-rows", bases=NF4),
    "one": Packed(n=(33,), r=(3,), bases=("nf4-nested",), bias=(True,), dropout_p=0.3),
}
for _m, _k in itertools.product((0, 1, 7, 33), (31, 97)):
    _shape = {"m": _m, "k": _k}
    CALLS[f"pair-{_m}x{_k}"] = Packed(
        n=(65, 65), r=(8, 5), bases=("dense",) * 2, bias=(False,) * 2, dropout_p=0.1, **_shape
    )
    CALLS[f"mixed-{_m}x{_k}"] = Packed(
        n=(40, 7, 130), bases=MIXED, dropout_p=0.3, adapter_dtype=FP32, **_shape
    )
_pair: dict[str, Any] = {"r": (8, 5), "bases": ("dense", "nf4"), "bias": (True, False)}
CALLS["no-input"] = Packed(k=0, n=(9, 16), dropout_p=0.1, **_pair)
CALLS["no-output"] = Packed(n=(0, 16), dropout_p=0.1, **_pair)
CALLS["no-nf4-output"] = Packed(n=(16, 0), **_pair)
WIDE = {
    f"{name}-{kind}": Packed(m=33, k=97, bias=(False,) * 3, range=of, **options)
    for name, of in RANGES.items()
    for kind, options in {
        "plain": {},
        "dropout": {"dropout_p": 0.3},
        "mixed": {"bases": MIXED, "dropout_p": 0.3, "adapter_dtype": FP32},
    }.items()
}
CORE = ("bias", "mixed", "one", "transposed", "mixed-0x31")


def _arguments(c: Packed, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """x, base, meta, a, b, scales, bias, dropout_p, seed"""
    x = r.normal(c.m, c.k, dtype=dtype, std=c.range.x)
    adapters = c.adapter_dtype or dtype
    base: list[Tensor] = []
    meta: list[int] = []
    for kind, n in zip(c.bases, c.n, strict=True):
        tensors, sizes = r.base(kind, n, c.k, dtype)
        base += tensors
        meta += [*sizes, *[0] * (META - len(sizes))]
    return (
        strided(x, c.strides) if c.strides else x,
        base,
        meta,
        [r.normal(rank, c.k, dtype=adapters, std=c.range.a * max(c.k, 1) ** -0.5) for rank in c.r],
        [
            r.normal(n, rank, dtype=adapters, std=c.range.b * rank**-0.5)
            for n, rank in zip(c.n, c.r, strict=True)
        ],
        list(SCALES[: len(c.n)]),
        [r.normal(n, dtype=dtype) if has else None for n, has in zip(c.n, c.bias, strict=True)],
        c.dropout_p,
        torch.tensor([SEED]) if c.dropout_p else None,
    )


def _backward(c: Packed, dtype: torch.dtype, r: Source) -> tuple[Any, ...]:
    """dy, x, s, base, meta, a, b, scales, dropout_p, seed, needs"""
    x, base, meta, a, b, scales, bias, *dropout = _arguments(c, dtype, r)
    dy = [r.normal(c.m, n, dtype=dtype, std=c.range.dy) for n in c.n]
    if c.strides:
        dy = [strided(t, c.strides) for t in dy]
    s = rank_value(r.normal(c.m, sum(c.r), std=c.range.s), dtype)
    weights = [kind == "dense" for kind in c.bases]
    p = len(c.n)
    needs = [True] * (1 + 2 * p) + [t is not None for t in bias] + weights
    if c.needs is not None:
        needs = [i in c.needs for i in range(len(needs))]
    return dy, x, s, base, meta, a, b, scales, *dropout, needs


def _cases(op: str, make: Any) -> Iterator[Case]:
    for dtype, (name, call) in itertools.product(DTYPES, CALLS.items()):
        yield Case(
            op,
            f"{dtype_name(dtype)}-{name}",
            lambda r, c=call, d=dtype: make(c, d, r),
            core=name in CORE and dtype is not torch.float16,
        )
    for name, call in WIDE.items():
        yield Case(op, f"float16-{name}", lambda r, c=call: make(c, torch.float16, r))


def lora_packed_fwd() -> Iterator[Case]:
    yield from _cases("lora_packed_fwd", _arguments)


def lora_packed_bwd() -> Iterator[Case]:
    yield from _cases("lora_packed_bwd", _backward)
    for i in range(1 + 4 * 3):  # one gradient at a time
        call = Packed(dropout_p=0.1, needs=(i,))
        yield Case(
            "lora_packed_bwd",
            f"needs-only-{i}",
            lambda r, c=call: _backward(c, torch.float32, r),
            core=i in (0, 2, 12),
        )
