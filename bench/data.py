"""Inputs of a case: seeded, with enough copies of the weight that no cache holds them all."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bench.cases import DTYPES, Case
from bench.costmodel import weight_bytes
from lora_kernels import NF4Weight, use_backend

MAX_COPIES = 128
INPUT_COPIES = 4  # an activation has just been written by the layer before: a few are enough


class CaseData:
    """Tensors of one case, made when first asked for and shared by all providers.

    Args:
        case: what is measured.
        device: where the tensors live.
        rotate_bytes: the weight's copies take at least this much together (at most 128 copies).
        seed: of the values.
    """

    def __init__(
        self, case: Case, device: torch.device, rotate_bytes: int = 1 << 30, seed: int = 0
    ) -> None:
        self.case = case
        self.device = device
        self.rotate_bytes = rotate_bytes
        self.dtype = DTYPES[case.dtype]
        self.adapter_dtype = DTYPES[case.adapter_dtype]
        self._generator = torch.Generator().manual_seed(seed)

        n, k, m, r = case.n, case.k, case.m, case.r
        # The values a trained layer has: activations of unit size, outputs too.
        self.source = self._normal(n, k, std=k**-0.5, dtype=self.dtype)
        self.bias = self._normal(n, std=0.1, dtype=self.dtype) if case.bias else None
        self.x = [self._normal(m, k, dtype=self.dtype) for _ in range(INPUT_COPIES)]
        for x in self.x:
            x.requires_grad_(case.backward)
        self.a = self._normal(r, k, std=k**-0.5, dtype=self.adapter_dtype)
        self.b = self._normal(n, r, std=0.1, dtype=self.adapter_dtype)
        for adapter in (self.a, self.b):
            adapter.requires_grad_(case.backward)

    @functools.cached_property
    def dy(self) -> list[Tensor]:
        c, generator = self.case, torch.Generator().manual_seed(1)
        drawn = (torch.randn(c.m, c.n, generator=generator) for _ in range(INPUT_COPIES))
        return [t.to(self.dtype).to(self.device) for t in drawn]

    @functools.cached_property
    def labels(self) -> Tensor:
        """A token of the vocabulary for each row of x."""
        generator = torch.Generator().manual_seed(2)
        return torch.randint(self.case.n, (self.case.m,), generator=generator).to(self.device)

    def _normal(self, *shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self._generator) * std
        return values.to(dtype).to(self.device)

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes make caches honest."""
        return max(1, min(MAX_COPIES, -(-self.rotate_bytes // max(nbytes, 1))))

    @functools.cached_property
    def quantised(self) -> NF4Weight:
        """The 4-bit weight that every quantised provider of the case holds, byte for byte."""
        c = self.case
        with use_backend("reference"):
            return NF4Weight.quantize(self.source, c.block_size, c.nested, c.quant_type)

    @functools.cached_property
    def weight(self) -> Tensor:
        """The dense weight: of a quantised case, the decoded one, so that all results agree."""
        if not self.case.is_quantised:
            return self.source
        with use_backend("reference"):
            return self.quantised.dequantize(self.dtype)

    @functools.cached_property
    def source_copies(self) -> list[Tensor]:
        """Copies of the weight before any quantisation, to quantise."""
        return [self.source.clone() for _ in range(self.copies(self.source.nbytes))]

    @functools.cached_property
    def dense_copies(self) -> list[Tensor]:
        return [self.weight.clone() for _ in range(self.copies(self.weight.nbytes))]

    def quantised_copies(self) -> list[NF4Weight]:
        """Fresh copies of the 4-bit weight; each caller has its own and may destroy them."""
        q = self.quantised
        return [
            q.with_tensors({name: t.clone() for name, t in q.tensors().items()})
            for _ in range(self.copies(weight_bytes(self.case)))
        ]
