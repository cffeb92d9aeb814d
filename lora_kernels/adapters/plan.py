"""What becomes of a model's layers: decided and checked before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.checks import check_layer, check_quantize
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import DENSE, LINEAR4BIT, kind_of
from lora_kernels.adapters.layers import get_module, named_modules, replace_module
from lora_kernels.adapters.modules_to_save import check_whole, match_modules
from lora_kernels.adapters.reads import Read, read_layers
from lora_kernels.adapters.targets import Targets, is_excluded, kept_dense
from lora_kernels.adapters.token_indices import Rows, check_tokens, find_rows
from lora_kernels.integrations.transformers import forget_quantizer
from lora_kernels.nn.linear4bit import check_not_repacked
from lora_kernels.nn.lora import check_adapter_dtype


@dataclass(frozen=True)
class Plan:
    """What becomes of a model. It names layers: a reference to one would keep its weight alive.

    Attributes:
        config: the adapter's options.
        targets: the layers that get an adapter.
        replaced: all layers to replace, in this order.
        quantized: those of them whose dense weight is stored in 4 bits.
        kept_dense: (name, reason) of layers that `quantize` leaves dense.
        linear4bit: bitsandbytes' layers.
        trained: modules that train whole.
        rows: rows of embeddings and output layers that train by themselves.
        quantize: options of `NF4Linear.from_linear`.
        adapter_dtype: of the adapters; None for the default over each base.
    """

    config: LoRAConfig
    targets: Targets
    replaced: tuple[str, ...]
    quantized: frozenset[str]
    kept_dense: tuple[tuple[str, str], ...]
    linear4bit: tuple[str, ...]
    trained: tuple[str, ...]
    rows: tuple[Rows, ...]
    quantize: Mapping[str, Any]
    adapter_dtype: torch.dtype | None


def make_plan(
    model: nn.Module,
    config: LoRAConfig,
    targets: Targets,
    *,
    quantize: str | None,
    block_size: int,
    double_quant: bool,
    adapter_dtype: torch.dtype | None = None,
) -> Plan:
    """Decide what becomes of each layer, and check every one of them.

    Raises:
        ValueError, TypeError: as `apply_lora`; the message names the layer or the option.
    """
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    trained = match_modules(model, config.modules_to_save or ())
    for name in trained:
        check_whole(model, name)
    rows = find_rows(model, config)
    reads = read_layers(model)
    check_tokens(model, rows, targets.names, trained, reads)
    quantized: set[str] = set()
    kept: list[tuple[str, str]] = []
    if quantize is not None:
        check_quantize(quantize, block_size)
        quantized, kept = plan_quantisation(model, config, targets.names, reads)
        quantized -= {row.name for row in rows}
    linear4bit = check_linear4bit_layers(model)
    called = [n for n in linear4bit if id(get_module(model, n)) not in reads]
    others = quantized | {n for n in called if not is_excluded(config, n)}
    replaced = (*targets.names, *sorted(others - set(targets.names)))
    for name in replaced:
        check_layer(name, get_module(model, name), reads, quantize=name in quantized)
    return Plan(
        config=config,
        targets=targets,
        replaced=replaced,
        quantized=frozenset(quantized),
        kept_dense=tuple(kept),
        linear4bit=tuple(linear4bit),
        trained=tuple(trained),
        rows=tuple(rows),
        quantize={
            "block_size": block_size,
            "double_quant": double_quant,
            "quant_type": quantize,
        },
        adapter_dtype=adapter_dtype,
    )


def check_linear4bit_layers(model: nn.Module) -> list[str]:
    """The names of bitsandbytes' layers; ValueError where one cannot be taken over."""
    names = [name for name, module in named_modules(model) if kind_of(module) is LINEAR4BIT]
    for name in names:
        check_not_repacked(name, get_module(model, name))
    return names


def plan_quantisation(
    model: nn.Module, config: LoRAConfig, targets: Iterable[str], reads: Mapping[int, Read]
) -> tuple[set[str], list[tuple[str, str]]]:
    """(names of layers to quantise, (name, reason) of layers that stay dense)."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    targets, stay = set(targets), kept_dense(model, config) | reads.keys()
    quantized: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name, module in named_modules(model):
        layer: Any = module
        if kind_of(layer) is not DENSE:
            continue
        if name not in targets and (
            is_excluded(config, name) or id(layer) in stay or DENSE.refusal(layer)
        ):
            continue
        if layer.weight.is_meta:
            raise ValueError(
                f"quantize: the weight of {name} is on the meta device, expected loaded values"
            )
        if id(layer) in reads:
            kept.append((name, f"{reads[id(layer)].reason}, kept dense"))
        elif holders[id(layer.weight)] > 1:
            kept.append((name, "weight is tied, kept dense"))
        else:
            quantized.add(name)
    return quantized, kept


def replace_layers(model: nn.Module, plan: Plan, names: Iterable[str]) -> None:
    """Replace the layers one after the other. Each dense weight is freed before the next layer's
    turn, so that the peak of memory is the model and one layer.

    Args:
        names: the plan's `replaced`, as `with_progress` gives them.
    """
    for name in names:
        layer = get_module(model, name)
        replace_module(model, layer, _new_layer(layer, name, plan))
        del layer
    leave_fast_path(model)
    if plan.linear4bit and not any(kind_of(module) is LINEAR4BIT for module in model.modules()):
        forget_quantizer(model)


def _new_layer(layer: nn.Module, name: str, plan: Plan) -> nn.Module:
    quantize = plan.quantize if name in plan.quantized else {}
    if name not in plan.targets.names:
        return kind_of(layer).to_nf4(layer, quantize)
    config = plan.config
    adapter = {
        "r": config.rank_of(name),
        "alpha": config.alpha_of(name),
        "dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "init": config.init,
        "adapter_dtype": plan.adapter_dtype,
        "use_dora": config.use_dora,
    }
    return kind_of(layer).with_adapter(layer, adapter, quantize)


def leave_fast_path(model: nn.Module) -> None:
    """Make nn.TransformerEncoderLayer call its layers. Its fused path only reads their weights."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if any(kind_of(child).ours for child in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False
