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

from torch import Tensor, nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.files import one_process, write_whole
from lora_kernels.adapters.layers import require_adapters, unwrap
from lora_kernels.adapters.reading import Factors
from lora_kernels.adapters.targets import shortest_targets
from lora_kernels.integrations.peft import CONFIG_FILE, MAGNITUDE, WEIGHTS_FILE, key_of
from lora_kernels.integrations.transformers import base_model_name, task_type
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.common import whole
from lora_kernels.nn.multi_lora_training import SlotAdapter
from lora_kernels.ops.common.kinds import check_kinds

AdapterLayer = LoRAMixin | SlotAdapter


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write the model's adapters as PEFT does: `adapter_config.json`, `adapter_model.safetensors`.

    Each file is written under a temporary name, flushed to the disk and renamed, the
    configuration last, so an interrupted save never leaves half a file. What is saved does not
    depend on whether the adapters are merged.

    Adapters that `fully_shard` has split over processes are gathered: every process calls this, and
    the first one writes.

    Args:
        model: a model with adapters; it may be compiled or wrapped for data parallelism.
        directory: made if it does not exist.

    Returns:
        The directory.

    Raises:
        ValueError: the model has no adapters, they are on the meta device, or their dropout or
            use_rslora or use_dora differ (PEFT's configuration has one value for all).
    """
    check_kinds(save_adapter, locals())
    model = unwrap(model)
    asked = getattr(model, "lora_config", None)
    return save_layers(model, require_adapters(model), asked, directory)


def save_layers(
    model: nn.Module,
    layers: Sequence[tuple[str, AdapterLayer]],
    asked: LoRAConfig | None,
    directory: str | os.PathLike[str],
) -> Path:
    """`save_adapter` of these layers; `asked` is the configuration that they were made from."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        for factor, t in _tensors_of(layer).items():
            if t.is_meta:
                raise ValueError(f"{name}: its adapter is on the meta device, expected values")
            tensors[key_of(name, factor)] = whole(t).detach().to("cpu").contiguous()
    config = _saved_config(model, layers, asked).to_peft_dict(
        base_model=base_model_name(model), task_type=task_type(model)
    )
    folder = Path(directory)
    text = json.dumps(config, indent=2) + "\n"
    files: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
        CONFIG_FILE: lambda path: path.write_text(text, encoding="utf-8"),
    }
    with one_process(t for _, m in layers for t in _tensors_of(m).values()) as writes:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for name, write in files.items():
                write_whole(folder / name, write)
    return folder


def _tensors_of(layer: AdapterLayer) -> Factors:
    """The adapter's tensors by their names in a checkpoint."""
    factors: Factors = {"A": layer.lora_A, "B": layer.lora_B}
    if layer.lora_magnitude_vector is not None:
        factors[MAGNITUDE] = layer.lora_magnitude_vector
    return factors


def _saved_config(
    model: nn.Module, layers: Sequence[tuple[str, AdapterLayer]], asked: LoRAConfig | None
) -> LoRAConfig:
    """A configuration that describes the layers as they are, whatever was asked for at first."""
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
