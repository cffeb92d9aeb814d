"""What the Triton NF4 kernels take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import refuse_device, refuse_triton, register_triton
from lora_kernels.ops.nf4.schema import check_scales


def _quantize(w: Tensor, block_size: int, quant_type: int) -> str | None:
    return refuse_triton([w])


def _quantize_scales(
    absmax: Tensor, nested_map: Tensor, nested_offset: Tensor, nested_block_size: int
) -> str | None:
    check_scales(absmax, nested_map, nested_offset)
    return refuse_device(absmax.device)


def _dequantize(base: Sequence[Tensor], meta: Sequence[int], dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "gives float32, float16, bfloat16, not float64"
    return refuse_device(base[0].device)


def _linear_fwd(
    x: Tensor, base: Sequence[Tensor], meta: Sequence[int], bias: Tensor | None
) -> str | None:
    return refuse_triton([x, bias])


def _linear_bwd(dy: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> str | None:
    return refuse_triton([dy])


register_triton("nf4_quantize", "lora_kernels.ops.nf4.triton.codec", _quantize)
register_triton("nf4_quantize_scales", "lora_kernels.ops.nf4.triton.codec", _quantize_scales)
register_triton("nf4_dequantize", "lora_kernels.ops.nf4.triton.codec", _dequantize)
register_triton("nf4_linear_fwd", "lora_kernels.ops.nf4.triton.linear", _linear_fwd)
register_triton("nf4_linear_bwd", "lora_kernels.ops.nf4.triton.linear", _linear_bwd)
