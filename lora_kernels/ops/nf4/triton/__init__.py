"""What the Triton NF4 kernels take; importing this does not import triton."""

from __future__ import annotations

import torch

from lora_kernels.ops.common.launch import refuse_device, refuse_triton, register_triton
from lora_kernels.ops.nf4.schema import (
    NF4Dequantize,
    NF4LinearBackward,
    NF4LinearForward,
    NF4Quantize,
    NF4QuantizeScales,
)


def _quantize(c: NF4Quantize) -> str | None:
    return refuse_triton([c.w])


def _quantize_scales(c: NF4QuantizeScales) -> str | None:
    c.check()
    return refuse_device(c.absmax.device)


def _dequantize(c: NF4Dequantize) -> str | None:
    if c.dtype == torch.float64:
        return "gives float32, float16, bfloat16, not float64"
    return refuse_device(c.base[0].device)


def _linear_fwd(c: NF4LinearForward) -> str | None:
    return refuse_triton([c.x, c.bias])


def _linear_bwd(c: NF4LinearBackward) -> str | None:
    return refuse_triton([c.dy])


register_triton("nf4_quantize", "lora_kernels.ops.nf4.triton.quantize", _quantize)
register_triton("nf4_quantize_scales", "lora_kernels.ops.nf4.triton.quantize", _quantize_scales)
register_triton("nf4_dequantize", "lora_kernels.ops.nf4.triton.quantize", _dequantize)
register_triton("nf4_linear_fwd", "lora_kernels.ops.nf4.triton.linear", _linear_fwd)
register_triton("nf4_linear_bwd", "lora_kernels.ops.nf4.triton.linear", _linear_bwd)
