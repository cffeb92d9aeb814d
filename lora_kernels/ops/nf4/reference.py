"""NF4 and FP4 in plain PyTorch: the format's definition, for reading and as the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.op import Implementation
from lora_kernels.dispatch.registry import register, register_reference
from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.checks import check_finite
from lora_kernels.ops.common.code_tables import code_bounds, code_values
from lora_kernels.ops.nf4.schema import (
    NF4Dequantize,
    NF4LinearBackward,
    NF4LinearForward,
    NF4Quantize,
    NF4QuantizeScales,
)

# bitsandbytes' floor for the scale that it divides by: a block of zeros encodes as zeros.
_SMALLEST_SCALE = 1e-38


@register_reference
def nf4_quantize(c: NF4Quantize) -> tuple[Tensor, Tensor]:
    """codes = nearest table entry of w * (1 / absmax), absmax = max |w| of each flat block."""
    block_size, flat = c.block_size, c.w.reshape(-1).float()
    check_finite("w", flat)
    pad = -flat.numel() % block_size
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if blocks.shape[0] else flat.new_empty(0)
    inverse = 1.0 / absmax.clamp(min=_SMALLEST_SCALE)
    scaled = (blocks * inverse[:, None]).clamp(-1, 1).flatten()[: flat.numel()]
    bounds, order = code_bounds(c.quant_type, flat.device)
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = order[torch.bucketize(scaled, bounds)]
    return codes[::2] << 4 | codes[1::2], absmax


def nf4_quantize_scales(c: NF4QuantizeScales) -> tuple[Tensor, Tensor]:
    """codes = nearest map entry of (absmax - offset) * (1 / nested_absmax), nested_absmax = max
    |absmax - offset| of each nested block."""
    absmax, nested_block_size = c.absmax, c.nested_block_size
    check_finite("absmax", absmax)
    centred = absmax - c.nested_offset
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % nested_block_size))
    blocks = blocks.view(-1, nested_block_size)
    nested_absmax = blocks.abs().amax(dim=1) if blocks.shape[0] else absmax.new_empty(0)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).flatten()[: centred.numel()]
    return _encode_scales(scaled, c.nested_map), nested_absmax


def _encode_scales(x: Tensor, code_map: Tensor) -> Tensor:
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


def block_scales(base: Sequence[Tensor], m: Meta) -> Tensor:
    """The fp32 scale of every block: nested scales are map[code] * nested_absmax + offset."""
    if not m.is_nested:
        return base[1]
    _, absmax8, nested_absmax, nested_map, nested_offset = base
    expanded = nested_absmax.repeat_interleave(m.nested_block_size)[: m.blocks]
    return nested_map[absmax8.int()] * expanded + nested_offset


def dequantize(base: Sequence[Tensor], meta: Sequence[int], dtype: torch.dtype) -> Tensor:
    """w = code * scale in fp32, rounded once to dtype."""
    m = Meta(*meta)
    packed = base[0]
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: m.n * m.k]
    values = code_values(m.quant_type, packed.device)[codes.int()]
    scales = block_scales(base, m).repeat_interleave(m.block_size)[: m.n * m.k]
    return (values * scales).to(dtype).view(m.n, m.k)


def dense_weight(base: Sequence[Tensor], meta: Sequence[int], dtype: torch.dtype) -> Tensor:
    """W [N, K] of a dense or 4-bit base in the compute type.

    The rounding rule of every backend and every M: weight = round(code * scale) to the compute
    type, then products accumulated in fp32.
    """
    return base[0] if Meta(*meta).is_dense else dequantize(base, meta, dtype)


@register_reference
def nf4_dequantize(c: NF4Dequantize) -> Tensor:
    return dequantize(*c)


@register_reference
def nf4_linear_fwd(c: NF4LinearForward) -> Tensor:
    """y = x·Wᵀ + bias."""
    return torch.nn.functional.linear(c.x, dense_weight(c.base, c.meta, c.x.dtype), c.bias)


@register_reference
def nf4_linear_bwd(c: NF4LinearBackward) -> Tensor:
    """dx = dy·W."""
    return c.dy @ dense_weight(c.base, c.meta, c.dy.dtype)


register(
    "nf4_quantize_scales",
    Implementation("reference", nf4_quantize_scales, NF4QuantizeScales.check),
)
