"""A call of the LoRA products as the cost model and the tables of measurements see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops.common.checks import names
from lora_kernels.ops.common.configs import next_power_of_2

OPS = ("lora_linear_fwd", "lora_linear_bwd")
STRATEGIES = ("single_pass", "epilogue", "addmm")


def block_rank(r: int) -> int:
    """Rank columns of a tile: tensor cores take 16 at least."""
    return min(max(16, next_power_of_2(r)), 64)


@dataclass(frozen=True)
class Problem:
    """A call as the cost model sees it; sizes of 0 count as 1.

    Attributes:
        m, n, k, r: rows, output and input features, rank.
        dtype: of x and W.
        dropout: whether the mask is regenerated.
        tma: whether x (or dy) and W allow tensor descriptors.
        quantised: whether W is 4-bit, decoded in the kernel.
    """

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    dropout: bool = False
    tma: bool = True
    quantised: bool = False

    def __str__(self) -> str:
        text = f"M={self.m} N={self.n} K={self.k} r={self.r} {names([self.dtype])}"
        return f"{text}{' dropout' * self.dropout}{' 4-bit' * self.quantised}"

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @property
    def block_r(self) -> int:
        return block_rank(self.r)

    @property
    def weight_size(self) -> float:
        """Bytes of a weight; 4-bit ones with their fp32 scales at the usual block of 64."""
        return 0.5 + 4 / 64 if self.quantised else self.size

    @property
    def weight_bytes(self) -> float:
        return self.weight_size * self.n * self.k
