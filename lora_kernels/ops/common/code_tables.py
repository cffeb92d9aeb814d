"""The 4-bit code tables in bitsandbytes' format: the only Python copy.

NF4: Dettmers et al., 2023, "QLoRA". FP4: sign, then the values of bitsandbytes' 4-bit float.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_POSITIVE = (0.0, 0.0052083333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
# Both zeros are +0, as in bitsandbytes.
_FP4 = (*_FP4_POSITIVE, *(-v or 0.0 for v in _FP4_POSITIVE))


@functools.cache
def code_values(quant_type: int, device: torch.device) -> Tensor:
    """The value of each code, fp32 [16]; quant_type 0 = nf4, 1 = fp4."""
    return torch.tensor(_FP4 if quant_type else _NF4, dtype=torch.float32, device=device)


@functools.cache
def code_bounds(quant_type: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds between neighbouring values, fp32 [15], and the codes in order of value, u8 [16].

    A value takes the code at the number of thresholds strictly below it: ties take the lower one.
    FP4's two zeros both stand in the order, 0 before 8, as in bitsandbytes: exact zero is code 0.
    """
    values = code_values(quant_type, torch.device("cpu"))
    order = torch.argsort(values, stable=True)
    ordered = values[order]
    bounds = (ordered[1:] + ordered[:-1]) * 0.5
    return bounds.to(device), order.to(torch.uint8).to(device)
