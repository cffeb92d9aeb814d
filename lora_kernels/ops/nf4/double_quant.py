"""Quantised scales (double quantisation) in bitsandbytes' format. Runs once, at set-up time.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (dynamic tree map) and 2023,
"QLoRA" (double quantisation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NESTED_BLOCK_SIZE = 256


class NestedScales(NamedTuple):
    codes: Tensor  # u8 [blocks]
    absmax: Tensor  # fp32 [ceil(blocks / 256)]
    map: Tensor  # fp32 [256]
    offset: Tensor  # fp32 [1]


def _dynamic_map() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (i - 6) * middles).tolist() + (-(10.0 ** (i - 6)) * middles).tolist()
    return tuple(sorted(values))


# Made on import, and numbers: under FakeTensorMode no tensor has values.
_DYNAMIC_MAP = _dynamic_map()


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The signed dynamic map, fp32 [256], ascending, a new tensor.

    Seven decades 10^-6 .. 10^0; decade i has 2^i values per sign, the midpoints of 2^i equal
    parts of [0.1, 1]; then 0 and 1.
    """
    return torch.tensor(_DYNAMIC_MAP, dtype=torch.float32, device=device or "cpu")


def quantize_scales(absmax: Tensor) -> NestedScales:
    """absmax ~ map[codes] * nested_absmax + offset, with offset = mean(absmax).

    Args:
        absmax: fp32 [blocks].
    """
    offset = absmax.mean().reshape(1)
    # The weight owns its map, which loading a checkpoint may overwrite.
    code_map = dynamic_map(absmax.device)
    codes, nested_absmax = torch.ops.lora_kernels.nf4_quantize_scales(
        absmax, code_map, offset, NESTED_BLOCK_SIZE
    )
    return NestedScales(codes, nested_absmax, code_map, offset)
