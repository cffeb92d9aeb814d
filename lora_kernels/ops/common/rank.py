"""The dtype of s = x·Aᵀ and ds = dy·B, the rank-wide results between two products.

Such a sum may exceed 65504, fp16's largest number, though the output made from it does not (a
merged weight never computes it). Under fp16 it is therefore stored in fp32, rounded to the 11
significant bits of fp16, so that the products that read it need no more than those. It costs 2·M·r
bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of s and ds, given that of the activations."""
    return torch.float32 if dtype == torch.float16 else dtype


def rank_value(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [M, r] as it is stored for activations of `dtype`."""
    if dtype != torch.float16:
        return t.to(dtype)
    mantissa, exponent = torch.frexp(t.float())
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)
