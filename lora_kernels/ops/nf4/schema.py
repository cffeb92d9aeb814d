"""Schemas, checks and fakes of the NF4 ops. x and dy are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.flops import Call
from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common.checks import check_dtype, check_optional_vector
from lora_kernels.ops.common.flops import product
from lora_kernels.ops.nf4.base import Meta, check_base, check_input


def check_linear(
    x: Tensor, base: Sequence[Tensor], meta: Sequence[int], bias: Tensor | None
) -> None:
    check_input(x, meta[1])
    check_base(x, base, meta)
    check_optional_vector("bias", bias, meta[0], x, [x.dtype])


def check_scales(absmax: Tensor, nested_map: Tensor, nested_offset: Tensor) -> None:
    """Called by every backend's `supports`: no public function stands before this op."""
    check_dtype("absmax", absmax, [torch.float32])
    check_dtype("nested_map", nested_map, [torch.float32])
    check_dtype("nested_offset", nested_offset, [torch.float32])


def _quantize_fake(w: Tensor, block_size: int, quant_type: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    return (
        w.new_empty((n + 1) // 2, dtype=torch.uint8),
        w.new_empty((n + block_size - 1) // block_size, dtype=torch.float32),
    )


def _quantize_scales_fake(
    absmax: Tensor, nested_map: Tensor, nested_offset: Tensor, nested_block_size: int
) -> tuple[Tensor, Tensor]:
    check_scales(absmax, nested_map, nested_offset)
    blocks = absmax.numel()
    return (
        absmax.new_empty(blocks, dtype=torch.uint8),
        absmax.new_empty((blocks + nested_block_size - 1) // nested_block_size),
    )


def _dequantize_fake(base: Sequence[Tensor], meta: Sequence[int], dtype: torch.dtype) -> Tensor:
    m = Meta(*meta)
    return base[0].new_empty((m.n, m.k), dtype=dtype)


def _linear_fwd_fake(
    x: Tensor, base: Sequence[Tensor], meta: Sequence[int], bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], meta[0]))


def _linear_bwd_fake(dy: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> Tensor:
    return dy.new_empty((dy.shape[0], meta[1]))


def _linear_fwd_flops(call: Call) -> int:
    return product(call.x[0], *call.meta[:2])


def _linear_bwd_flops(call: Call) -> int:
    return product(call.dy[0], *call.meta[:2])


define(
    "nf4_quantize",
    "(Tensor w, int block_size, int quant_type) -> (Tensor packed, Tensor absmax)",
    _quantize_fake,
    flops=None,
)
define(
    "nf4_quantize_scales",
    "(Tensor absmax, Tensor nested_map, Tensor nested_offset, int nested_block_size)"
    " -> (Tensor codes, Tensor nested_absmax)",
    _quantize_scales_fake,
    flops=None,
)
define(
    "nf4_dequantize",
    "(Tensor[] base, int[] meta, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    flops=None,
)
define(
    "nf4_linear_fwd",
    "(Tensor x, Tensor[] base, int[] meta, Tensor? bias) -> Tensor",
    _linear_fwd_fake,
    flops=_linear_fwd_flops,
)
define(
    "nf4_linear_bwd",
    "(Tensor dy, Tensor[] base, int[] meta) -> Tensor",
    _linear_bwd_fake,
    flops=_linear_bwd_flops,
)
