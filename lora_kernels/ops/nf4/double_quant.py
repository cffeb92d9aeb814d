"""Quantised scales (double quantisation) in bitsandbytes' format. Runs once, at set-up time.

Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization" (dynamic tree map) and 2023,
"QLoRA" (double quantisation).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

NESTED_BLOCK_SIZE = 256


class NestedScales(NamedTuple):
    codes: Tensor  # u8 [blocks]
    absmax: Tensor  # fp32 [ceil(blocks / 256)]
    map: Tensor  # fp32 [256]
    offset: Tensor  # fp32 [1]


@functools.cache
def dynamic_map() -> Tensor:
    """The signed dynamic map, fp32 [256], ascending.

    Seven decades 10^-6 .. 10^0; decade i has 2^i values per sign, the midpoints of 2^i equal
    parts of [0.1, 1]; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (i - 6) * middles).tolist() + (-(10.0 ** (i - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def quantize_scales(absmax: Tensor) -> NestedScales:
    """absmax ~ map[codes] * nested_absmax + offset, with offset = mean(absmax).

    Args:
        absmax: fp32 [blocks].
    """
    offset = absmax.mean()
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE))
    blocks = blocks.view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).flatten()[: centred.numel()]
    # A copy: the weight owns its map, which loading a checkpoint may overwrite.
    code_map = dynamic_map().to(absmax.device, copy=True)
    return NestedScales(_encode(scaled, code_map), nested_absmax, code_map, offset.reshape(1))


def _encode(x: Tensor, code_map: Tensor) -> Tensor:
    """The code nearest to x after rounding x to a grid of 65536 points on [-1, 1].

    The grid is bitsandbytes' (its CPU path looks codes up by it): without it one code in six
    hundred would be another, closer one.
    """
    x = x.nan_to_num(-1.0)  # 0 * (1 / 0), in a block of equal scales
    grid = torch.floor((x + 1.0) * 32767.5 + 0.5).clamp(0, 65535)
    x = grid / 32767.5 - 1.0
    upper = torch.searchsorted(code_map, x).clamp(1, 255)
    below, above = code_map[upper - 1], code_map[upper]
    return torch.where((above - x).abs() < (x - below).abs(), upper, upper - 1).to(torch.uint8)
