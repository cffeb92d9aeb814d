"""Saving and loading adapters in PEFT's format."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.apply import apply_config, check_model
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.files import one_process, write_whole
from lora_kernels.adapters.layers import (
    adapter_layers,
    get_module,
    named_modules,
    require_adapters,
    unwrap,
)
from lora_kernels.adapters.targets import Targets, find_targets, shortest_targets
from lora_kernels.integrations.peft import (
    CONFIG_FILE,
    MAGNITUDE,
    PICKLED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    check_config,
    check_directory,
    key_of,
    split_key,
)
from lora_kernels.integrations.transformers import base_model_name, task_type
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.common import fill, whole
from lora_kernels.nn.multi_lora_training import SlotAdapter
from lora_kernels.ops.common.checks import FLOATS, names
from lora_kernels.ops.common.kinds import check_kinds

Factors = dict[str, Tensor]
AdapterLayer = LoRAMixin | SlotAdapter


@dataclass(frozen=True)
class LoadResult:
    """What `load_adapter` did.

    Attributes:
        modules: names of the layers whose adapter was loaded.
        missing_keys: tensors that the model's adapters have and the file does not.
        unexpected_keys: tensors of the file that the model has no place for.

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

    Examples:
        >>> report = lk.apply_lora(model, r=8)
        >>> folder = lk.save_adapter(model, "adapter")
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
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

    A plain model first gets adapters as the file's configuration says (they train; call
    `requires_grad_(False)` or torch.no_grad() where they should not). Into a model with adapters
    the weights and scales are copied; its dropout stays as it is. Merged layers are merged anew.
    Everything is checked before anything is changed.

    Args:
        model: a model with adapters or a plain one.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        strict: False turns missing and unexpected tensors, and configuration options that are not
            known, into warnings.
        quantize, block_size, double_quant: store a plain model's base in 4 bits, as in
            `apply_lora`.

    Returns:
        The layers loaded, and with strict=False the keys that were missing or unexpected.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is damaged, the adapter is neither LoRA nor DoRA, or not what the model's
            layers are, its weights disagree with its configuration or with the model, or hold
            non-finite values.
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
    options = _read_config(folder / CONFIG_FILE)
    with _naming(folder / CONFIG_FILE):
        config = LoRAConfig.from_peft_dict(options)
        unknown = check_config(options)
    if unknown:
        _complain(strict, f"{folder / CONFIG_FILE}: {', '.join(unknown)}: not known here")
    factors, unexpected = _read_weights(folder / WEIGHTS_FILE)
    kinds = ("A", "B", MAGNITUDE) if config.use_dora else ("A", "B")
    unexpected += _drop_other_kinds(factors, kinds)
    with _naming(folder / WEIGHTS_FILE):
        _check_factors(config, factors)

    layers = dict(adapter_layers(model))
    if layers and quantize is not None:
        raise ValueError(f"quantize: got {quantize!r}, but the model has adapters already")
    if layers:
        expected = set(layers)
    elif strict and not options.get("layers_to_transform"):
        expected = set(find_targets(model, config).names)
    else:
        expected = set(factors) & {name for name, _ in named_modules(model)}
    for name in sorted(set(factors) - expected):
        unexpected += [key_of(name, factor) for factor in factors.pop(name)]
    # A pair without its other half was refused: what may be missing is a layer, or a magnitude.
    missing = [key_of(n, f) for n in sorted(expected) for f in kinds if f not in factors.get(n, {})]
    for kind, keys in (("missing from", missing), ("not expected in", unexpected)):
        if keys:
            _complain(strict, f"{len(keys)} tensors {kind} {folder / WEIGHTS_FILE}: {_some(keys)}")
    if not factors:
        raise ValueError(f"{folder / WEIGHTS_FILE}: holds no adapter for {type(model).__name__}")
    for name, pair in factors.items():
        _check_fit(name, pair, model, layers.get(name), config.use_dora)

    if not layers:
        apply_config(
            model,
            config,
            Targets(tuple(factors), ()),
            quantize=quantize,
            block_size=block_size,
            double_quant=double_quant,
        )
        layers = dict(adapter_layers(model))
    for name, pair in factors.items():
        _fill(layers[name], pair, config.alpha_of(name), config.use_rslora)
    return LoadResult(tuple(factors), tuple(missing), tuple(unexpected))


def _fill(layer: LoRAMixin, pair: Factors, alpha: float, use_rslora: bool) -> None:
    fill(layer.lora_A, pair["A"])
    fill(layer.lora_B, pair["B"])
    layer.alpha, layer.use_rslora = alpha, use_rslora
    if layer.lora_magnitude_vector is not None and MAGNITUDE in pair:
        fill(layer.lora_magnitude_vector, pair[MAGNITUDE])
    else:
        layer.reset_magnitude()
    layer.refresh_merged()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _complain(strict: bool, text: str) -> None:
    if strict:
        raise ValueError(f"{text} (strict=False goes on without)")
    warnings.warn(text, stacklevel=3)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an adapter saved by PEFT")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: holds a {type(options).__name__}, expected an object")
    return options


def _read_weights(path: Path) -> tuple[dict[str, Factors], list[str]]:
    """({module: {"A": tensor, "B": tensor}}, keys of any other kind)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        pickled = path.with_name(PICKLED_WEIGHTS_FILE).is_file()
        hint = f"; {PICKLED_WEIGHTS_FILE} is a pickle, convert it with PEFT" if pickled else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is damaged or no safetensors file ({error})") from error
    factors: dict[str, Factors] = {}
    other: list[str] = []
    for key, tensor in tensors.items():
        where = split_key(key)
        if where is None:
            other.append(key)
        else:
            factors.setdefault(where[0], {})[where[1]] = tensor
    return factors, other


def _drop_other_kinds(factors: dict[str, Factors], kinds: tuple[str, ...]) -> list[str]:
    """Take out tensors that the configuration has no use for; return their keys."""
    dropped = []
    for name in list(factors):
        for kind in set(factors[name]) - set(kinds):
            del factors[name][kind]
            dropped.append(key_of(name, kind))
        if not factors[name]:
            del factors[name]
    return dropped


def _check_factors(config: LoRAConfig, factors: dict[str, Factors]) -> None:
    """Check the tensors by themselves and against the configuration's ranks."""
    for name, pair in factors.items():
        for factor in "AB":
            if factor not in pair:
                raise ValueError(f"{key_of(name, factor)}: is missing")
        for factor, t in pair.items():
            key = key_of(name, factor)
            if t.dtype not in FLOATS:
                raise TypeError(f"{key}: got dtype {names([t.dtype])}, expected {names(FLOATS)}")
            dims = 1 if factor == MAGNITUDE else 2
            if t.dim() != dims:
                raise ValueError(f"{key}: got shape {list(t.shape)}, expected {dims} dimension(s)")
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{key}: holds non-finite values")
        ranks = pair["A"].shape[0], pair["B"].shape[1]
        if ranks != (config.rank_of(name),) * 2:
            raise ValueError(
                f"{name}: lora_A has rank {ranks[0]} and lora_B {ranks[1]}, but the configuration "
                f"says r={config.rank_of(name)}"
            )


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
