"""Storing a model's linear layers in 4 bits: which of them, and what is checked before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import named_modules
from lora_kernels.adapters.reads import Read, read_only
from lora_kernels.adapters.targets import is_excluded, kept_dense
from lora_kernels.nn import LoRALinear, NF4Linear
from lora_kernels.nn.common import check_finite_weight, check_linear_layer
from lora_kernels.nn.linear4bit import check_linear4bit, is_linear4bit
from lora_kernels.nn.multi_lora_training import TrainableMultiLoRALinear
from lora_kernels.ops.common.kinds import describe
from lora_kernels.ops.nf4.base import QUANT_TYPES, check_block_size


def check_quantize(quantize: object, block_size: int) -> None:
    """Raise ValueError for a format to quantise to that there is not."""
    if quantize not in QUANT_TYPES:
        raise ValueError(
            f"quantize: got {describe(quantize)}, expected {' or '.join(QUANT_TYPES)}, or None"
        )
    check_block_size("block_size", block_size)


def check_layer(name: str, layer: Any, reads: Mapping[int, Read], *, quantised: bool) -> None:
    """Raise what converting the layer would raise, without converting it."""
    try:
        if reason := read_only(layer, reads):
            raise ValueError(reason)
        if isinstance(layer, NF4Linear):
            layer.weight.check()
        elif is_linear4bit(layer):
            check_linear4bit(layer)
        else:
            check_linear_layer(layer)
            if quantised:
                check_finite_weight(layer.weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def without_adapter(layer: nn.Module, form: dict[str, Any]) -> NF4Linear:
    if is_linear4bit(layer):
        return NF4Linear.from_linear4bit(layer)
    assert isinstance(layer, nn.Linear)
    return NF4Linear.from_linear(layer, **form)


def plan_quantisation(
    model: nn.Module, config: LoRAConfig, targets: tuple[str, ...], reads: Mapping[int, Read]
) -> tuple[set[str], list[tuple[str, str]]]:
    """(names of layers to quantise, (name, reason) of layers that stay dense)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    stay = kept_dense(model)
    dense: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name, module in named_modules(model):
        if not isinstance(module, nn.Linear) or is_linear4bit(module):
            continue
        if name not in targets:
            if is_excluded(config, name) or id(module) in stay | reads.keys():
                continue
            try:
                check_linear_layer(module)
            except (TypeError, ValueError):
                continue
        if module.weight.is_meta:
            raise ValueError(
                f"quantize: the weight of {name} is on the meta device, expected loaded values"
            )
        if id(module) in reads:
            kept.append((name, f"{reads[id(module)].reason}, kept dense"))
        elif owners[id(module.weight)] > 1:
            kept.append((name, "weight is tied, kept dense"))
        else:
            dense.add(name)
    return dense, kept


def leave_fast_path(model: nn.Module) -> None:
    """Make nn.TransformerEncoderLayer call its layers: its fused path reads their weights only."""
    ours = (LoRALinear, NF4Linear, TrainableMultiLoRALinear)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, ours) for child in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, ours) for child in module.modules()
        ):
            module.use_nested_tensor = False
