"""What the compiled NF4 kernels take (csrc/bindings: nf4, linear, nf4_cuda, nf4_linear_cuda)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import (
    EMPTY,
    refuse_cuda_linear,
    refuse_device,
    refuse_dtypes,
    refuse_linear,
    register_native,
)
from lora_kernels.ops.nf4.schema import check_scales


def _quantize(w: Tensor, block_size: int, quant_type: int) -> str | None:
    return refuse_device("nf4_quantize", w.device) or refuse_dtypes(w)


def _quantize_scales(
    absmax: Tensor, nested_map: Tensor, nested_offset: Tensor, nested_block_size: int
) -> str | None:
    check_scales(absmax, nested_map, nested_offset)
    return refuse_device("nf4_quantize_scales", absmax.device)


def _dequantize(base: Sequence[Tensor], meta: Sequence[int], dtype: torch.dtype) -> str | None:
    reason = refuse_device("nf4_dequantize", base[0].device)
    if reason is None and dtype == torch.float64:
        reason = "gives float32, float16, bfloat16, not float64"
    return reason


def _linear_fwd(
    x: Tensor, base: Sequence[Tensor], meta: Sequence[int], bias: Tensor | None
) -> str | None:
    reason = refuse_linear("nf4_linear_fwd", [x], bias) or refuse_cuda_linear(x, meta)
    return EMPTY if reason is None and meta[0] == 0 else reason


def _linear_bwd(dy: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> str | None:
    reason = refuse_linear("nf4_linear_bwd", [dy])
    return EMPTY if reason is None and meta[1] == 0 else reason


register_native("nf4_quantize", _quantize)
register_native("nf4_quantize_scales", _quantize_scales)
register_native("nf4_dequantize", _dequantize)
register_native("nf4_linear_fwd", _linear_fwd)
register_native("nf4_linear_bwd", _linear_bwd)
