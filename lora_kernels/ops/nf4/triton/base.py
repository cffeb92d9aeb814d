"""A base weight, dense or 4-bit, as the Triton kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.triton_host import descriptor, takes_tma
from lora_kernels.ops.nf4.base import Meta
from lora_kernels.ops.nf4.tables import code_values


class Weight:
    """W [N, K] of `base` and `meta` (`ops/nf4/base.py`)."""

    def __init__(self, base: Sequence[Tensor], meta: Sequence[int]) -> None:
        self.base, self.meta = base, Meta(*meta)
        self.quantised = not self.meta.is_dense

    def takes_tma(self, x: Tensor) -> bool:
        """Whether x, and a dense W, allow tensor descriptors."""
        return takes_tma(x) if self.quantised else takes_tma(x, self.base[0])

    def args(self, config: GemmConfig, backward: bool) -> dict[str, Any]:
        """What a kernel around `lora_tiles.product_tile` takes of W, for x·Wᵀ or for dy·W."""
        if self.quantised:
            columns = config.block_n if backward else config.block_k
            return {
                **scale_args(self.base, self.meta),
                "w": self.base[0],
                "stride_wk": 0,
                "stride_wn": 0,
                "p_table": table(self.meta.quant_type, self.base[0].device),
                "block_size": self.meta.block_size,
                "CHUNK": gcd(self.meta.k, self.meta.block_size, columns),
            }
        w = self.base[0]
        absent = dict.fromkeys(("p_absmax", "p_nested", "p_map", "p_offset", "p_table"))
        rows, columns = w.stride(0), w.stride(1)
        box = [config.block_k, config.block_n] if backward else [config.block_n, config.block_k]
        return {
            **absent,
            "w": descriptor(w, box) if config.tma else w,
            "stride_wk": rows if backward else columns,
            "stride_wn": columns if backward else rows,
            "nested_size": 0,
            "block_size": 0,
            "CHUNK": 0,
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
        "nested_size": m.nested_block_size,
    }
