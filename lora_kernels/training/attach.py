"""Putting many trainable adapters on a model's layers, and taking them off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.checks import (
    check_layer,
    check_model,
    check_patterns,
    check_quantize,
)
from lora_kernels.adapters.layer_kinds import LINEAR4BIT, kind_of
from lora_kernels.adapters.layers import get_module, named_modules, replace_module
from lora_kernels.adapters.plan import (
    check_linear4bit_layers,
    leave_fast_path,
    plan_quantisation,
)
from lora_kernels.adapters.reads import read_layers
from lora_kernels.adapters.targets import find_targets
from lora_kernels.nn.lora import check_adapter_dtype, default_adapter_dtype
from lora_kernels.nn.multi_lora_training import (
    RouteHolder,
    SlotAdapter,
    TrainableMultiLoRALinear,
)

Layers = dict[str, TrainableMultiLoRALinear]


def attach_adapters(
    model: nn.Module,
    configs: Sequence[LoRAConfig],
    generators: Sequence[torch.Generator],
    *,
    quantize: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    adapter_dtype: torch.dtype | None = None,
) -> tuple[Layers, RouteHolder]:
    """Freeze the model and put one adapter of each configuration on it, in slots 0, 1, ...

    The layers are those that `apply_lora` would adapt, and A is drawn in the same order from the
    slot's generator. `quantize` stores a layer in 4 bits if `apply_lora` would for any of the
    configurations. Everything is checked before the first layer is replaced.

    Returns:
        The layers with adapters by name, and the holder of the current batch's route.

    Raises:
        As `apply_lora`; ValueError for a model with adapters or a pool already.
    """
    check_model(model)
    if quantize is not None:
        check_quantize(quantize, block_size)
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    reads, targets = read_layers(model), []
    quantized: set[str] = set()
    for config in configs:
        for option in ("modules_to_save", "trainable_token_indices"):
            if asked := getattr(config, option):
                raise ValueError(
                    f"{option}: got {asked!r}, which is not supported where many adapters train "
                    "over one base"
                )
        names = find_targets(model, config).names
        check_patterns(config, names)
        targets.append(names)
        if quantize is not None:
            quantized |= plan_quantisation(model, config, names, reads)[0]
    adapted = {name for names in targets for name in names}
    check_linear4bit_layers(model)
    for name in sorted(adapted | quantized):
        check_layer(name, get_module(model, name), reads, quantize=name in quantized)
    model.requires_grad_(False)
    options: dict[str, Any] = {
        "block_size": block_size,
        "double_quant": double_quant,
        "quant_type": quantize,
    }
    holder, layers = RouteHolder(), Layers()
    for name in [n for n, _ in named_modules(model) if n in adapted | quantized]:
        base: Any = get_module(model, name)
        old = base
        if name in quantized or kind_of(base) is LINEAR4BIT:
            base = kind_of(base).to_nf4(base, options if name in quantized else {})
        if name in adapted:
            base = layers[name] = TrainableMultiLoRALinear(base, len(configs), holder, name)
        replace_module(model, old, base)
    for slot, (config, names) in enumerate(zip(configs, targets, strict=True)):
        for name in names:  # A is drawn in apply_lora's order
            layers[name].add(slot, _drawn(layers[name], config, generators[slot], adapter_dtype))
    leave_fast_path(model)
    return layers, holder


def _drawn(
    layer: TrainableMultiLoRALinear,
    config: LoRAConfig,
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> SlotAdapter:
    weight = layer.base.weight
    return SlotAdapter(
        layer.in_features,
        layer.out_features,
        r=config.rank_of(layer.name),
        alpha=config.alpha_of(layer.name),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        init=config.init,
        dtype=dtype or default_adapter_dtype(weight.dtype),
        device=weight.device,
        generator=generator,
    )


def detach_adapters(model: nn.Module) -> tuple[str, ...]:
    """Put the layers back that a `MultiLoRATrainer` adapted. What it quantised stays in 4 bits.

    Returns:
        Their names.

    Examples:
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> batches = [{"input_ids": ids, "labels": ids}] * 2
        >>> job = lk.training.AdapterJob(lk.LoRAConfig(target_modules=["q_proj"]), batches)
        >>> trainer = lk.training.MultiLoRATrainer(model, {"french": job})
        >>> lk.training.detach_adapters(model)
        ('model.layers.0.self_attn.q_proj',)
    """
    found = [(n, m) for n, m in named_modules(model) if kind_of(m).in_training]
    for _, layer in found:
        replace_module(model, layer, kind_of(layer).base_layer(layer))
    return tuple(name for name, _ in found)


def device_of(model: nn.Module) -> torch.device:
    """The one device that a model is on.

    Raises:
        ValueError: the model is on several devices, on meta, or has no values at all.
    """
    found = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(found) != 1 or any(device.type == "meta" for device in found):
        listed = ", ".join(sorted(map(str, found))) or "none"
        raise ValueError(f"model: is on {listed}, expected one device that holds values")
    return found.pop()
