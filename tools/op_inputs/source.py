"""Where the tensors of a call come from: random values of a seed, or memory without values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from lora_kernels.ops.nf4.double_quant import dynamic_map

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, FP16, BF16)
SEED = -1234567890123456789  # of a call's dropout: all of its 64 bits matter

Shape = tuple[int, int, int, int]  # M, N, K, r
# Block size, double quantisation, quant_type; None is a dense weight.
Format = tuple[int, bool, str] | None
BASES: dict[str, Format] = {
    "dense": None,
    "nf4": (64, False, "nf4"),
    "nf4-nested": (64, True, "nf4"),
    "fp4-nested-b32": (32, True, "fp4"),
}


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


ANY = Range()
RANGES = {
    "wide-s": Range(x=2.0**5, a=2.0**13, b=2.0**-8, dy=2.0**-10, s=2.0**18),
    "wide-ds": Range(x=2.0**-9, a=2.0**-9, b=2.0**6, dy=2.0**11, s=2.0**-4),
    "tiny-ds": Range(x=2.0**5, a=2.0**9, b=2.0**-8, dy=2.0**-16),
}


class Source:
    """Random tensors from a generator of its own, drawn where they live."""

    hollow = False

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.device)
        return (values * std).to(dtype)

    def integers(self, low: int, high: int, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """From `low` up to, not including, `high`."""
        return torch.randint(
            low, high, (count,), generator=self.generator, device=self.device, dtype=dtype
        )

    def weight(self, n: int, k: int, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """W [N, K] whose products with unit rows are near `factor`."""
        return self.normal(n, k, dtype=dtype, std=factor * max(k, 1) ** -0.5)

    def adapter(
        self, n: int, k: int, r: int, dtype: torch.dtype, of: Range = ANY
    ) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r]."""
        return self.weight(r, k, dtype, of.a), self.weight(n, r, dtype, of.b)

    def base(
        self, kind: str | Format, n: int, k: int, dtype: torch.dtype, factor: float = 1.0
    ) -> tuple[list[Tensor], list[int]]:
        """W [N, K] of a kind in `BASES` or of a format, as the ops take it."""
        w, form = self.weight(n, k, dtype, factor), BASES[kind] if isinstance(kind, str) else kind
        if form is None:
            return [w], [n, k]
        q = self.quantised(w, form)
        return q.base, q.meta

    def quantised(self, w: Tensor, form: tuple[int, bool, str]) -> NF4Weight:
        with use_backend("reference"):
            return NF4Weight.quantize(w, *form)

    def seed(self, value: int = SEED) -> Tensor:
        return torch.tensor([value], device=self.device)


class Hollow(Source):
    """Tensors of the right shape and dtype with nothing in them: what launches depend on."""

    hollow = True

    def normal(self, *shape: int, dtype: torch.dtype = FP32, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def base(
        self, kind: str | Format, n: int, k: int, dtype: torch.dtype, factor: float = 1.0
    ) -> tuple[list[Tensor], list[int]]:
        form = BASES[kind] if isinstance(kind, str) else kind
        if form is None:
            return super().base(None, n, k, dtype)
        block, nested, quant_type = form
        meta = [n, k, block, ("nf4", "fp4").index(quant_type), 256 * nested]
        blocks = -(-n * k // block)
        codes = torch.empty(-(-n * k // 2), dtype=torch.uint8)
        if not nested:
            return [codes, torch.empty(blocks)], meta
        absmax = torch.empty(blocks, dtype=torch.uint8)
        return [codes, absmax, torch.empty(-(-blocks // 256)), dynamic_map(), torch.empty(1)], meta


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values [M, K] in other memory; "" leaves them where they are."""
    rows, cols = t.shape
    if kind == "":
        return t
    if kind == "transposed":
        return t.T.contiguous().T
    if kind == "padded-rows":
        return t.new_zeros(rows, cols + 3)[:, 1 : cols + 1].copy_(t)
    if kind == "every-other-column":
        return t.new_zeros(rows, 2 * cols)[:, ::2].copy_(t)
    if kind == "expanded":  # what `y.sum().backward()` sends
        return t[:1, :1].expand(rows, cols)
    raise ValueError(f"strides: got {kind!r}")
