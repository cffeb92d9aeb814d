"""A base weight, dense or 4-bit, as the Triton kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.code_tables import code_values
from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.triton_host import descriptor, takes_tma


class Weight:
    """W [N, K] of `base` and `meta` (`ops/common/base.py`)."""

    def __init__(self, base: Sequence[Tensor], meta: Sequence[int]) -> None:
        self.base, self.meta = base, Meta(*meta)
        self.quantised = not self.meta.is_dense

    def takes_tma(self, x: Tensor) -> bool:
        """Whether x, and a dense W, allow tensor descriptors."""
        return takes_tma(x) if self.quantised else takes_tma(x, self.base[0])

    def args(self, config: GemmConfig, backward: bool) -> dict[str, Any]:
        """What a kernel around `lora_tiles.product_tile` takes of W, for x·Wᵀ or for dy·W."""
        decode = self.decode_args(config.block_n if backward else config.block_k)
        w, rows, columns = self.matrix
        if config.tma and not self.quantised:
            box = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
            return {**decode, "w": descriptor(w, box), "stride_wk": 0, "stride_wn": 0}
        return {
            **decode,
            "w": w,
            "stride_wk": rows if backward else columns,
            "stride_wn": columns if backward else rows,
        }

    @property
    def matrix(self) -> tuple[Tensor, int, int]:
        """W and its strides; codes have none that a kernel asks for."""
        w = self.base[0]
        return (w, 0, 0) if self.quantised else (w, w.stride(0), w.stride(1))

    def decode_args(self, columns: int) -> dict[str, Any]:
        """What `nf4_tiles.weight_tile` takes, for tiles of so many columns; CHUNK is 0 where W is
        dense."""
        if not self.quantised:
            absent = dict.fromkeys(("p_absmax", "p_nested", "p_map", "p_offset", "p_table"))
            return {**absent, "CHUNK": 0, "BLOCK": 0, "NESTED": 0}
        return {
            **scale_args(self.base, self.meta),
            "p_table": table(self.meta.quant_type, self.base[0].device),
            "CHUNK": gcd(self.meta.k, self.meta.block_size, columns),
            "BLOCK": self.meta.block_size,
        }


def table(quant_type: int, device: torch.device) -> Tensor:
    """The value of each code, fp32 [16]."""
    return code_values(quant_type, device)


def scale_args(base: Sequence[Tensor], m: Meta) -> dict[str, Any]:
    """Arguments of `nf4_tiles.block_scales`."""
    return {
        "p_absmax": base[1],
        "p_nested": base[2] if m.is_nested else None,
        "p_map": base[3] if m.is_nested else None,
        "p_offset": base[4] if m.is_nested else None,
        "NESTED": m.nested_block_size,
    }
