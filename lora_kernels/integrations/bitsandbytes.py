"""Converting between bitsandbytes' 4-bit layers and this package's, which store the same bytes.

Only the functions named `to_*` import bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_kernels.nn import NF4Linear
from lora_kernels.nn.linear4bit import (
    is_linear4bit,
    weight_from_linear4bit,
    weight_from_quant_state,
)
from lora_kernels.ops.nf4.weight import NF4Weight

__all__ = [
    "is_linear4bit",
    "to_linear4bit",
    "to_params4bit",
    "weight_from_linear4bit",
    "weight_from_quant_state",
]


def to_params4bit(weight: NF4Weight, quant_storage: torch.dtype = torch.uint8) -> Any:
    """A bitsandbytes Params4bit that shares the weight's tensors.

    Args:
        weight: the 4-bit weight.
        quant_storage: dtype of the tensor that holds the bytes; their number must be a multiple
            of its size.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the bytes do not divide into `quant_storage`.

    Examples:
        >>> from lora_kernels.integrations.bitsandbytes import to_params4bit
        >>> weight = lk.NF4Weight.quantize(torch.randn(32, 64))
        >>> to_params4bit(weight).quant_state.quant_type
        'nf4'
    """
    import bitsandbytes as bnb

    entries = weight.state_dict_entries()
    packed = entries.pop("weight")
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quant_storage: got {quant_storage}, which does not divide {packed.numel()} bytes"
        )
    data = packed.view(-1).view(quant_storage).view(-1, 1)
    return bnb.nn.Params4bit.from_prequantized(data, entries, device=weight.device)


def to_linear4bit(
    layer: NF4Linear,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """A bitsandbytes Linear4bit with the layer's weight and bias, neither of them copied.

    An adapter on the layer is not converted; merge it first with `to_nf4_linear()`.

    Raises:
        ImportError: bitsandbytes is not installed.
        TypeError: `layer` is no NF4Linear.

    Examples:
        >>> from lora_kernels.integrations.bitsandbytes import to_linear4bit
        >>> layer = lk.NF4Linear.from_linear(torch.nn.Linear(64, 32))
        >>> type(to_linear4bit(layer)).__name__
        'Linear4bit'
    """
    if not isinstance(layer, NF4Linear):
        raise TypeError(f"layer: got {type(layer).__name__}, expected NF4Linear")
    import bitsandbytes as bnb

    weight = layer.weight
    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=weight.is_nested,
        quant_type=weight.quant_type,
        quant_storage=quant_storage,
        device="meta",
    )
    made.weight = to_params4bit(weight, quant_storage)
    made.weight.module = made
    made.quant_state = made.weight.quant_state
    made.bias = layer.bias
    return made.train(layer.training)
