"""What the compiled NF4 kernels take (csrc/bindings: nf4, nf4_cuda, nf4_linear_cuda)."""

from __future__ import annotations

import torch

from lora_kernels.ops.common.native import (
    EMPTY,
    refuse_cuda_linear,
    refuse_device,
    refuse_dtypes,
    refuse_linear,
    register_native,
)
from lora_kernels.ops.nf4.schema import (
    NF4Dequantize,
    NF4LinearBackward,
    NF4LinearForward,
    NF4Quantize,
    NF4QuantizeScales,
)


def _quantize(c: NF4Quantize) -> str | None:
    return refuse_device("nf4_quantize", c.w.device) or refuse_dtypes(c.w)


def _quantize_scales(c: NF4QuantizeScales) -> str | None:
    c.check()
    return refuse_device("nf4_quantize_scales", c.absmax.device)


def _dequantize(c: NF4Dequantize) -> str | None:
    reason = refuse_device("nf4_dequantize", c.base[0].device)
    if reason is None and c.dtype == torch.float64:
        reason = "gives float32, float16, bfloat16, not float64"
    return reason


def _linear_fwd(c: NF4LinearForward) -> str | None:
    reason = refuse_linear("nf4_linear_fwd", [c.x], c.bias) or refuse_cuda_linear(c.x, c.meta)
    return EMPTY if reason is None and c.meta[0] == 0 else reason


def _linear_bwd(c: NF4LinearBackward) -> str | None:
    reason = refuse_linear("nf4_linear_bwd", [c.dy])
    return EMPTY if reason is None and c.meta[1] == 0 else reason


register_native("nf4_quantize", _quantize)
register_native("nf4_quantize_scales", _quantize_scales)
register_native("nf4_dequantize", _dequantize)
register_native("nf4_linear_fwd", _linear_fwd)
register_native("nf4_linear_bwd", _linear_bwd)
