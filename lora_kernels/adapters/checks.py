"""Checks of a model and its layers before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import named_modules
from lora_kernels.adapters.reads import Read, read_only
from lora_kernels.integrations.peft import pattern_value
from lora_kernels.ops.common.base import QUANT_TYPES, check_block_size
from lora_kernels.ops.common.kinds import describe


def check_model(model: nn.Module) -> None:
    """Raise unless adapters can be put on this model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {describe(model)}, expected a torch.nn.Module")
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model: {type(model).__name__} has PEFT adapters already; pass the base model"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError("model: is compiled already; call apply_lora before torch.compile")
    if kind_of(model).linear:
        raise ValueError(
            f"model: is a {type(model).__name__}, which cannot be replaced inside itself; use "
            "LoRALinear.from_linear"
        )
    kinds = [(name, kind_of(module)) for name, module in named_modules(model)]
    pooled = [name for name, kind in kinds if kind.pooled]
    if pooled:
        raise ValueError(f"model: {pooled[0]} has a pool already; serving.detach_pool removes it")
    training = [name for name, kind in kinds if kind.in_training]
    if training:
        raise ValueError(
            f"model: {type(model).__name__} has adapters in training on {training[0]} and others; "
            "training.detach_adapters removes them"
        )
    adapted = [name for name, kind in kinds if kind.adapted]
    if adapted:
        raise ValueError(
            f"model: {type(model).__name__} has adapters on {len(adapted)} layers already "
            f"({', '.join(adapted[:3])}, ...); merge_and_unload removes them"
        )


def check_quantize(quantize: object, block_size: int) -> None:
    """Raise ValueError unless `quantize` names a 4-bit format."""
    if quantize not in QUANT_TYPES:
        raise ValueError(
            f"quantize: got {describe(quantize)}, expected {' or '.join(QUANT_TYPES)}, or None"
        )
    check_block_size("block_size", block_size)


def check_layer(name: str, layer: Any, reads: Mapping[int, Read], *, quantize: bool) -> None:
    """Raise what converting the layer would raise, without converting it."""
    try:
        if reason := read_only(layer, reads):
            raise ValueError(reason)
        kind_of(layer).check(layer, quantize=quantize)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_patterns(config: LoRAConfig, names: Sequence[str]) -> None:
    """Raise ValueError for a rank or alpha pattern that fits none of the adapted layers."""
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(pattern_value({pattern: True}, name, False) for name in names):
                raise ValueError(
                    f"{option}: {pattern!r} matches none of the {len(names)} adapted layers, such "
                    f"as {names[0]!r}"
                )
