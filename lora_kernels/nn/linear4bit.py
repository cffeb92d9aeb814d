"""Reading a bitsandbytes Linear4bit without importing bitsandbytes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_kernels.nn.common import check_finite_weight
from lora_kernels.ops.nf4.weight import NF4Weight


def is_linear4bit(module: object) -> bool:
    """Whether this is bitsandbytes' Linear4bit or a subclass of it.

    Examples:
        >>> from lora_kernels.integrations.bitsandbytes import is_linear4bit
        >>> is_linear4bit(torch.nn.Linear(64, 32))
        False
    """
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.split(".")[0] == "bitsandbytes"
        for cls in type(module).__mro__
    )


def weight_from_linear4bit(layer: nn.Module) -> NF4Weight:
    """The 4-bit weight of a bitsandbytes Linear4bit, sharing its tensors.

    A layer that is not quantised yet, because it was never moved to a device, is quantised with its
    own settings.

    Raises:
        TypeError: `layer` is no Linear4bit.
        ValueError: bitsandbytes has repacked the weight in place for CPU inference, which rounds
            the scales to bf16, or the weight is in no 4-bit format at all.

    Examples:
        >>> import bitsandbytes as bnb
        >>> from lora_kernels.integrations.bitsandbytes import weight_from_linear4bit
        >>> layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4")
        >>> weight = weight_from_linear4bit(layer)
        >>> weight.shape, weight.quant_type
        ((32, 64), 'nf4')
    """
    if not is_linear4bit(layer):
        raise TypeError(f"layer: got {type(layer).__name__}, expected bitsandbytes.nn.Linear4bit")
    weight: Any = layer.weight
    state = _quant_state(layer)
    if state is None:
        return _quantize(weight, weight.data)
    return weight_from_quant_state(weight.data, state)


def check_linear4bit(layer: nn.Module) -> None:
    """Raise what `weight_from_linear4bit` would, without quantising anything."""
    weight: Any = layer.weight
    if _quant_state(layer) is None:
        _quantize(weight, weight.data[:0])  # checks the settings on no values
        check_finite_weight(weight.data)
    else:
        weight_from_linear4bit(layer)


def _quant_state(layer: nn.Module) -> Any:
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _quantize(weight: Any, values: Tensor) -> NF4Weight:
    """`values`, quantised with the settings of a Params4bit that is not quantised yet."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"layer.weight: is {list(weight.shape)} {weight.dtype} on {weight.device} without "
            "a quantisation state, expected a loaded Linear4bit"
        )
    return NF4Weight.quantize(
        values, weight.blocksize, weight.compress_statistics, weight.quant_type
    )


def check_not_repacked(name: str, layer: Any) -> None:
    """Raise ValueError if bitsandbytes has repacked this layer's weight for CPU inference."""
    _refuse_repacked(name, getattr(layer.weight, "quant_state", None))


def _refuse_repacked(name: str, state: Any) -> None:
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}.weight: bitsandbytes has repacked it in place for CPU inference, with its "
            "scales rounded to bf16; load the checkpoint again and convert the layer before it "
            "runs in eval mode"
        )


def weight_from_quant_state(packed: Any, state: Any) -> NF4Weight:
    """The 4-bit weight made of the two results of `bitsandbytes.functional.quantize_4bit`, shared.

    Examples:
        >>> import bitsandbytes as bnb
        >>> from lora_kernels.integrations.bitsandbytes import weight_from_quant_state
        >>> packed, state = bnb.functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
        >>> weight_from_quant_state(packed, state).shape
        (32, 64)
    """
    _refuse_repacked("layer", state)
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return NF4Weight.from_state_dict({"weight": packed, **parts})
