"""Saving adapters in PEFT's format."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.extras import Extras, find_extras
from lora_kernels.adapters.files import one_process, write_whole
from lora_kernels.adapters.layers import require_adapters, unwrap
from lora_kernels.adapters.modules_to_save import is_inside, match_modules
from lora_kernels.adapters.reading import Factors
from lora_kernels.adapters.targets import shortest_targets
from lora_kernels.integrations.peft import (
    CONFIG_FILE,
    MAGNITUDE,
    WEIGHTS_FILE,
    key_of,
    modules_of_task,
)
from lora_kernels.integrations.transformers import base_model_name, task_type
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.common import whole
from lora_kernels.nn.multi_lora_training import SlotAdapter
from lora_kernels.ops.common.kinds import check_kinds

AdapterLayer = LoRAMixin | SlotAdapter


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    modules_to_save: Iterable[str] = (),
) -> Path:
    """Write the model's adapters as PEFT does: `adapter_config.json`, `adapter_model.safetensors`.

    The file also holds the modules that train whole and the rows of embeddings that train. If the
    vocabulary was resized since the model was loaded, it holds the embedding and the output layer
    too (with a warning, as in PEFT).

    Each file is written under a temporary name, flushed to the disk and renamed, the
    configuration last, so an interrupted save never leaves half a file. What is saved does not
    depend on whether the adapters are merged.

    Adapters that `fully_shard` has split over processes are gathered. Every process has to call
    this; the first one writes.

    Args:
        model: a model with adapters; it may be compiled or wrapped for data parallelism.
        directory: is created if it does not exist.
        modules_to_save: ends of the names of more modules to write whole, such as a norm that was
            unfrozen by hand.

    Returns:
        The directory.

    Raises:
        ValueError: the model has no adapters; they are on the meta device; their dropout,
            use_rslora or use_dora differ (PEFT's configuration has one value for all); or a
            parameter trains that would not be saved (the message names it).

    Examples:
        >>> report = lk.apply_lora(model, r=8)
        >>> folder = lk.save_adapter(model, "adapter")
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_kinds(save_adapter, locals())
    if isinstance(model, nn.Module) and hasattr(model, "peft_config"):
        raise ValueError(
            f"model: {type(model).__name__} has PEFT's adapters; its save_pretrained writes them"
        )
    model = unwrap(model)
    asked = getattr(model, "lora_config", None)
    layers = require_adapters(model)
    return save_layers(model, layers, asked, directory, find_extras(model, asked, modules_to_save))


def save_layers(
    model: nn.Module,
    layers: Sequence[tuple[str, AdapterLayer]],
    asked: LoRAConfig | None,
    directory: str | os.PathLike[str],
    extras: Extras | None = None,
) -> Path:
    """`save_adapter` of these layers; `asked` is the configuration that they were made from."""
    from safetensors.torch import save_file

    sources: dict[str, Tensor] = {
        key_of(name, factor): t
        for name, layer in layers
        for factor, t in _tensors_of(layer).items()
    }
    config = _saved_config(model, layers, asked)
    if extras is not None:
        sources |= extras.tensors
        config = replace(
            config,
            modules_to_save=extras.modules or None,
            trainable_token_indices=extras.tokens or None,
        )
    for key, t in sources.items():
        if t.is_meta:
            raise ValueError(f"{key}: is on the meta device, expected values")
    tensors = {key: _host_copy(t) for key, t in sources.items()}
    options = config.to_peft_dict(
        base_model=base_model_name(model), task_type=_saved_task(model, config)
    )
    folder = Path(directory)
    text = json.dumps(options, indent=2) + "\n"
    files: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
        CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
    }
    with one_process(sources.values()) as writes:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in files.items():
                write_whole(folder / name, write)
    return folder


def _host_copy(t: Tensor) -> Tensor:
    """A whole tensor on the host, in memory of its own."""
    t = whole(t).detach()
    return t.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _saved_task(model: nn.Module, config: LoRAConfig) -> str | None:
    """PEFT's name of the task; None if PEFT would expect a head that is not saved."""
    task = task_type(model)
    saved = match_modules(model, config.modules_to_save or ())
    expected = match_modules(model, modules_of_task(task))
    return task if all(is_inside(name, saved) for name in expected) else None


def _tensors_of(layer: AdapterLayer) -> Factors:
    """The adapter's tensors by their names in a checkpoint."""
    factors: Factors = {"A": layer.lora_A, "B": layer.lora_B}
    if layer.lora_magnitude_vector is not None:
        factors[MAGNITUDE] = layer.lora_magnitude_vector
    return factors


def _saved_config(
    model: nn.Module, layers: Sequence[tuple[str, AdapterLayer]], asked: LoRAConfig | None
) -> LoRAConfig:
    """A configuration that describes the layers as they are, which may differ from `asked`."""
    for option in ("dropout", "use_rslora", "use_dora"):
        values = {getattr(layer, option) for _, layer in layers}
        if len(values) > 1:
            raise ValueError(f"{option}: the layers have {sorted(values)}, expected one value")
    first = layers[0][1]
    asked = asked or LoRAConfig(
        r=_usual(layer.r for _, layer in layers),
        alpha=_usual(layer.alpha for _, layer in layers),
        init=first.init,
    )
    ranks: dict[str, Any] = dict(asked.rank_pattern)
    alphas: dict[str, Any] = dict(asked.alpha_pattern)
    if any(asked.rank_of(name) != layer.r for name, layer in layers):
        ranks = {_exactly(n): layer.r for n, layer in layers if layer.r != asked.r}
    if any(asked.alpha_of(name) != layer.alpha for name, layer in layers):
        alphas = {_exactly(n): layer.alpha for n, layer in layers if layer.alpha != asked.alpha}
    return replace(
        asked,
        dropout=first.dropout,
        use_rslora=first.use_rslora,
        use_dora=first.use_dora,
        target_modules=shortest_targets(model, [name for name, _ in layers]),
        exclude_modules=(),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    return "^" + re.escape(name)
