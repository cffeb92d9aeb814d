"""What s = x·Aᵀ and ds = dy·B are held in, the rank-wide results between two products.

Such a sum may be beyond 65504, fp16's largest number, where the output that it becomes is not: the
merged weight never makes it. Under fp16 it is held in fp32, and keeps the 11 bits that fp16 has,
so that the products which take it need no more than those. It costs 2·M·r bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of s and ds for activations of a dtype."""
    return torch.float32 if dtype == torch.float16 else dtype


def rank_value(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t [M, r] as it is kept for activations of a dtype."""
    if dtype != torch.float16:
        return t.to(dtype)
    mantissa, exponent = torch.frexp(t.float())
    return torch.ldexp((mantissa * 2048).round() / 2048, exponent)
