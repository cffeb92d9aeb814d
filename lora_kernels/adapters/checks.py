"""What a model must not be or have before adapters go on it."""

from __future__ import annotations

from torch import nn

from lora_kernels.adapters.layers import adapter_layers, named_modules
from lora_kernels.nn import NF4Linear
from lora_kernels.nn.multi_lora_embedding import POOLED
from lora_kernels.nn.multi_lora_training import TrainableMultiLoRALinear
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
    if isinstance(model, nn.Linear | NF4Linear):
        raise ValueError(
            f"model: is a {type(model).__name__}, which cannot be replaced inside itself; use "
            "LoRALinear.from_linear"
        )
    pooled = next((n for n, m in named_modules(model) if isinstance(m, POOLED)), None)
    if pooled is not None:
        raise ValueError(f"model: {pooled} has a pool already; serving.detach_pool removes it")
    training = [n for n, m in named_modules(model) if isinstance(m, TrainableMultiLoRALinear)]
    if training:
        raise ValueError(
            f"model: {type(model).__name__} has adapters in training on {training[0]} and others; "
            "training.detach_adapters removes them"
        )
    adapted = [name for name, _ in adapter_layers(model)]
    if adapted:
        raise ValueError(
            f"model: {type(model).__name__} has adapters on {len(adapted)} layers already "
            f"({', '.join(adapted[:3])}, ...); merge_and_unload removes them"
        )
