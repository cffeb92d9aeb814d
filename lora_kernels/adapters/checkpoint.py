"""Loading adapters in PEFT's format."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.apply import put_adapters
from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import (
    adapter_layers,
    get_module,
    named_modules,
    unwrap,
)
from lora_kernels.adapters.modules_to_save import (
    is_inside,
    match_modules,
    whole_modules,
    with_tied,
)
from lora_kernels.adapters.placing import fill_base, fill_trained, place
from lora_kernels.adapters.plan import make_plan
from lora_kernels.adapters.reading import (
    Factors,
    check_factors,
    drop_other_kinds,
    naming,
    read_config,
    read_weights,
    weights_file,
)
from lora_kernels.adapters.targets import Targets, find_targets
from lora_kernels.adapters.words import first_few
from lora_kernels.integrations.peft import (
    CONFIG_FILE,
    MAGNITUDE,
    check_config,
    check_directory,
    key_of,
)
from lora_kernels.integrations.transformers import task_heads
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.common import fill
from lora_kernels.ops.common.checks import names
from lora_kernels.ops.common.kinds import check_kinds


@dataclass(frozen=True)
class LoadResult:
    """What `load_adapter` did.

    Attributes:
        modules: names of the layers whose adapter was loaded.
        missing_keys: tensors that the model's adapters have and the file does not.
        unexpected_keys: tensors of the file that belong nowhere in the model.
        modules_to_save: names of the modules that were loaded whole.
        base_weights: weights of the base that the file holds and that were loaded: those of an
            adapted output layer, or of a vocabulary that was resized.

    Examples:
        >>> report = lk.apply_lora(model, target_modules=["q_proj"])
        >>> folder = lk.save_adapter(model, "adapter")
        >>> result = lk.load_adapter(model, "adapter")
        >>> result.modules, result.missing_keys
        (('model.layers.0.self_attn.q_proj',), ())
    """

    modules: tuple[str, ...]
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    base_weights: tuple[str, ...] = ()


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    strict: bool = True,
    quantize: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
) -> LoadResult:
    """Load adapters that `save_adapter` or PEFT wrote.

    A plain model first gets adapters as the file's configuration says. They require gradients;
    call `requires_grad_(False)`, or use torch.no_grad(), to run them only. Into a model with
    adapters the weights and scales are copied, and its dropout stays. Merged layers are merged
    again. Modules that were saved whole, and rows of an embedding, are loaded too. Everything is
    checked before anything is changed.

    Args:
        model: a model with adapters or a plain one.
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (or, as older PEFT
            wrote it, `adapter_model.bin`).
        strict: False turns errors about missing or unexpected tensors, and about unknown options
            of the configuration, into warnings.
        quantize, block_size, double_quant: store a plain model's base in 4 bits, as in
            `apply_lora`.

    Returns:
        The layers that were loaded, and with strict=False the missing and unexpected keys.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged; the adapter is neither LoRA nor DoRA, or another kind than
            the model's; its weights contradict its configuration or the model, or hold non-finite
            values.
        TypeError: a tensor or an option has the wrong type.

    Examples:
        >>> report = lk.apply_lora(model, r=8)
        >>> folder = lk.save_adapter(model, "adapter")
        >>> base = lk.merge_and_unload(model)  # plain layers again
        >>> len(lk.load_adapter(base, "adapter", quantize="nf4").modules)
        7
    """
    check_kinds(load_adapter, locals())
    if next(adapter_layers(model), None) is None:
        check_model(model)
    model, folder = unwrap(model), check_directory(directory)
    options = read_config(folder / CONFIG_FILE)
    with naming(folder / CONFIG_FILE):
        config = LoRAConfig.from_peft_dict(options)
        unknown = check_config(options)
    if unknown:
        _complain(strict, f"{folder / CONFIG_FILE}: {', '.join(unknown)}: not known here")
    path = weights_file(folder)
    factors, other = read_weights(path)
    kinds = ("A", "B", MAGNITUDE) if config.use_dora else ("A", "B")
    unexpected = drop_other_kinds(factors, kinds)
    layers = dict(adapter_layers(model))
    if layers and quantize is not None:
        raise ValueError(f"quantize: got {quantize!r}, but the model has adapters already")
    config = with_tied(model, config)
    marked = [name for name, _ in whole_modules(model)] if layers else None
    with naming(path):
        check_factors(config, factors)
        placed = place(model, config, other, {*layers, *factors}, marked=marked)
    unexpected += placed.unexpected
    if layers:
        expected = set(layers)
    elif strict and not options.get("layers_to_transform"):
        expected = set(find_targets(model, config, lenient=True).names)
    else:
        expected = set(factors) & {name for name, _ in named_modules(model)}
    for name in sorted(set(factors) - expected):
        unexpected += [key_of(name, factor) for factor in factors.pop(name)]
    # A without B was refused above, so only whole layers or magnitudes can be missing.
    missing = [key_of(n, f) for n in sorted(expected) for f in kinds if f not in factors.get(n, {})]
    missing += placed.missing
    for kind, keys in (("missing from", missing), ("not expected in", unexpected)):
        if keys:
            _complain(strict, f"{len(keys)} tensors {kind} {path}: {first_few(keys)}")
    if not factors:
        raise ValueError(f"{path}: holds no adapter for {type(model).__name__}")
    for name, pair in factors.items():
        _check_fit(name, pair, model, layers.get(name), config.use_dora)

    trained = match_modules(model, config.modules_to_save or ())
    if heads := [n for n in task_heads(model) if not is_inside(n, trained) and n not in expected]:
        warnings.warn(
            f"{path}: holds no weights of {', '.join(heads)}: predictions are those of the model's "
            "own head",
            stacklevel=2,
        )
    if layers:
        fill_base(model, placed)
    else:
        plan = make_plan(
            model,
            config,
            Targets(tuple(factors), ()),
            quantize=quantize,
            block_size=block_size,
            double_quant=double_quant,
        )
        fill_base(model, placed)
        put_adapters(model, plan)
        layers = dict(adapter_layers(model))
    fill_trained(model, placed)
    for name, pair in factors.items():
        _fill(layers[name], pair, config.alpha_of(name), config.use_rslora)
    return LoadResult(
        tuple(factors),
        tuple(missing),
        tuple(unexpected),
        tuple(placed.saved),
        tuple(f"{module}.{tensor}" for module, tensor in placed.base),
    )


def _fill(layer: LoRAMixin, pair: Factors, alpha: float, use_rslora: bool) -> None:
    fill(layer.lora_A, pair["A"])
    fill(layer.lora_B, pair["B"])
    layer.alpha, layer.use_rslora = alpha, use_rslora
    if layer.lora_magnitude_vector is not None and MAGNITUDE in pair:
        fill(layer.lora_magnitude_vector, pair[MAGNITUDE])
    else:
        layer.reset_magnitude()
    layer.refresh_merged()


def _complain(strict: bool, text: str) -> None:
    if strict:
        raise ValueError(f"{text} (strict=False goes on without)")
    warnings.warn(text, stacklevel=3)


def _check_fit(
    name: str, pair: Factors, model: nn.Module, layer: LoRAMixin | None, use_dora: bool
) -> None:
    """Check an adapter's tensors against the layer that they are for."""
    module: Any = layer or get_module(model, name)
    k, n = module.in_features, module.out_features
    got = pair["A"].shape[1], pair["B"].shape[0]
    if got != (k, n):
        raise ValueError(
            f"{name}: the adapter is for a layer with in_features={got[0]}, out_features={got[1]}, "
            f"the model's has {k}, {n}"
        )
    magnitude = pair.get(MAGNITUDE)
    if magnitude is not None and magnitude.shape[0] != n:
        raise ValueError(
            f"{key_of(name, MAGNITUDE)}: got shape {list(magnitude.shape)}, expected [{n}]"
        )
    if layer is None:
        return
    if layer.use_dora != use_dora:
        raise ValueError(
            f"{name}: the adapter has use_dora={use_dora}, the model's layer has "
            f"use_dora={layer.use_dora}; load it into a model without adapters"
        )
    if layer.lora_A.is_meta:
        raise ValueError(f"{name}: the model's adapter is on the meta device; call to_empty first")
    if layer.r != pair["A"].shape[0]:
        raise ValueError(
            f"{name}: the adapter has rank {pair['A'].shape[0]}, the model's has r={layer.r}; load "
            "it into a model without adapters"
        )
    dtype = layer.lora_A.dtype
    if not all(bool(torch.isfinite(t.to(dtype)).all()) for t in pair.values()):
        raise ValueError(f"{name}: the adapter overflows the model's {names([dtype])}")
