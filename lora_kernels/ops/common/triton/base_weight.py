"""A base weight, dense or 4-bit, as the Triton kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.code_tables import code_values
from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.triton.arguments import Base, constant, matrix
from lora_kernels.ops.common.triton_host import descriptor, takes_tma

# What decodes a dense weight.
_DENSE = (None,) * 5


class Weight:
    """W [N, K] of `base` and `meta` (`ops/common/base.py`)."""

    def __init__(self, base: Sequence[Tensor], meta: Sequence[int]) -> None:
        self.base, self.meta = base, Meta(*meta)
        self.quantised = not self.meta.is_dense

    def takes_tma(self, x: Tensor) -> bool:
        """Whether x, and a dense W, allow tensor descriptors."""
        return takes_tma(x) if self.quantised else takes_tma(x, self.base[0])

    def args(self, config: GemmConfig, backward: bool) -> Base:
        """W as a product reads it, for x·Wᵀ or for dy·W."""
        w = self.base[0]
        if self.quantised:
            return self.decode_args(config.block_n if backward else config.block_k)
        if config.tma:
            box = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
            return Base(descriptor(w, box), 0, 0, *_DENSE, *_plain())
        return Base(*matrix(w, transposed=not backward), *_DENSE, *_plain())

    def decode_args(self, columns: int) -> Base:
        """W [N, K] for tiles of so many columns."""
        w, m = self.base[0], self.meta
        if not self.quantised:
            return Base(*matrix(w), *_DENSE, *_plain())
        nested, code_map, offset = self.base[2:5] if m.is_nested else (None, None, None)
        return Base(
            w,
            0,  # a kernel asks for no strides of codes
            0,
            self.base[1],
            nested,
            code_map,
            offset,
            code_values(m.quant_type, w.device),
            constant(gcd(m.k, m.block_size, columns)),
            constant(m.block_size),
            constant(m.nested_block_size),
        )


def _plain() -> tuple[Any, Any, Any]:
    """CHUNK, BLOCK and NESTED of a dense weight."""
    return constant(0), constant(0), constant(0)
