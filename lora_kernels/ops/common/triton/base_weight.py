"""A base weight, dense or 4-bit, as the Triton kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.code_tables import code_values
from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.triton.arguments import Base, Format, Matrix, constants, matrix
from lora_kernels.ops.common.triton_host import descriptor, takes_tma


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
            return Base(Matrix(descriptor(w, box), 0, 0), None, None, None, None, None, _dense())
        return Base(matrix(w, transposed=not backward), None, None, None, None, None, _dense())

    def decode_args(self, columns: int) -> Base:
        """W [N, K] for tiles of so many columns."""
        w, m = self.base[0], self.meta
        if not self.quantised:
            return Base(matrix(w), None, None, None, None, None, _dense())
        nested, code_map, offset = self.base[2:5] if m.is_nested else (None, None, None)
        return Base(
            Matrix(w, 0, 0),  # a kernel asks for no strides of codes
            self.base[1],
            nested,
            code_map,
            offset,
            code_values(m.quant_type, w.device),
            constants(Format(gcd(m.k, m.block_size, columns), m.block_size, m.nested_block_size)),
        )


def _dense() -> Any:
    return constants(Format(0, 0, 0))
