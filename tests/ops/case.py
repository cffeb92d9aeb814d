"""A labelled call of an op, and what its arguments are made of."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# name -> block size, double quantisation, quant_type; None is a dense weight
BASES: dict[str, tuple[int, bool, str] | None] = {
    "dense": None,
    "nf4": (64, False, "nf4"),
    "nf4-nested": (64, True, "nf4"),
    "fp4-nested-b32": (32, True, "fp4"),
}


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


@dataclass(frozen=True)
class Range:
    """Factors on a call's random tensors that take a rank-wide sum out of fp16's range, or DoRA's
    output before its magnitude; what comes of it is within."""

    x: float = 1.0
    w: float = 1.0
    a: float = 1.0
    b: float = 1.0
    dy: float = 1.0
    s: float = 1.0
    magnitude: float = 1.0


RANGES = {
    "wide-s": Range(x=2.0**5, a=2.0**13, b=2.0**-8, dy=2.0**-10, s=2.0**18),
    "wide-ds": Range(x=2.0**-9, a=2.0**-9, b=2.0**6, dy=2.0**11),
    "tiny-ds": Range(x=2.0**5, a=2.0**9, b=2.0**-8, dy=2.0**-16),
}
ANY = Range()
WIDE_SHAPES = ((5, 12, 20, 3), (33, 129, 257, 17))  # M, N, K, R
WIDE_BASES = ("dense", "nf4-nested")


class Source:
    """Random tensors from a case's own generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * std).to(dtype)

    def base(
        self, name: str, n: int, k: int, dtype: torch.dtype, factor: float = 1.0
    ) -> tuple[list[Tensor], list[int]]:
        """W [N, K] of a kind in `BASES`, as the ops take it."""
        w = self.normal(n, k, dtype=dtype, std=factor * max(k, 1) ** -0.5)
        if BASES[name] is None:
            return [w], [n, k]
        with use_backend("reference"):
            q = NF4Weight.quantize(w, *BASES[name])
        return q.base, q.meta


def move(value: Any, device: str) -> Any:
    """The arguments on another device, strides kept."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(move(v, device) for v in value)
    return value


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values [M, K] in other memory."""
    rows, cols = t.shape
    if kind == "transposed":
        return t.T.contiguous().T
    if kind == "padded-rows":
        return t.new_zeros(rows, cols + 3)[:, 1 : cols + 1].copy_(t)
    if kind == "every-other-column":
        return t.new_zeros(rows, 2 * cols)[:, ::2].copy_(t)
    if kind == "expanded":  # what `y.sum().backward()` sends
        return t[:1, :1].expand(rows, cols)
    raise ValueError(kind)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def size_name(*sizes: int) -> str:
    return "x".join(map(str, sizes))
