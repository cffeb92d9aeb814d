"""PEFT's adapter checkpoint: file names, tensor keys and what its configuration may say.

Source: PEFT 0.21, `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
ALL_LINEAR = "all-linear"

_PREFIX = "base_model.model."
MAGNITUDE = "magnitude_vector"
EMBEDDING = {"A": "embedding_A", "B": "embedding_B"}  # A [r, V], B [D, r] of an nn.Embedding
# The adapter's name stands in the key only where a whole PEFT model was saved by hand.
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_"
    rf"((?P<factor>[AB])(\.default)?\.weight|(?P<magnitude>{MAGNITUDE})(\.default\.weight)?"
    rf"|(?P<embedding>embedding_[AB])(\.default)?)"
)

# Options that change what a layer computes, with the values that are LoRA or DoRA.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "bias": ("none",),
    "fan_in_fan_out": (),
    "kasa_config": (),
    "layer_replication": (),
    "lora_bias": (),
    "megatron_config": (),
    "modules_to_save": (),
    "monteclora_config": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (),
    "use_dora": (True,),
    "use_qalora": (),
    "velora_config": (),
}
# Initialisations that leave the base weight as it was; the others train against a changed one.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
# Options that say how an adapter came about, or where its layers are, not what they compute.
_WITHOUT_EFFECT = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


def check_directory(directory: object, name: str = "directory") -> Path:
    """The path of an adapter's directory; an error that names the argument where there is none."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"{name}: got {type(directory).__name__}, expected a directory's path")
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: got {str(directory)!r}, which is no directory here; expected one that holds "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} (huggingface_hub.snapshot_download fetches one from "
            "the hub)"
        )
    return folder


def key_of(module: str, factor: str) -> str:
    """The tensor key of `lora_A`, `lora_B` or DoRA's magnitude (factor "A", "B" or `MAGNITUDE`)."""
    return f"{_PREFIX}{module}.lora_{factor}{'.weight' if factor in 'AB' else ''}"


def split_key(key: str) -> tuple[str, str] | None:
    """(module, "A", "B", `MAGNITUDE` or one of `EMBEDDING`) of an adapter tensor's key; None for
    any other key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    return match["module"], match["factor"] or match["magnitude"] or match["embedding"]


def base_key_of(module: str) -> str:
    """The key under which PEFT saves a copy of an adapted embedding's or output layer's weight."""
    return f"{_PREFIX}{module}.base_layer.weight"


def check_config(config: Mapping[str, Any]) -> list[str]:
    """Refuse whatever is not LoRA or DoRA; return the set options that are not known here.

    Raises:
        ValueError: names the option, its value and what is supported.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type: got {kind!r}, expected 'LORA'")
    for option, plain in _PLAIN_LORA.items():
        value = config.get(option)
        if _is_set(value) and value not in plain:
            raise ValueError(f"{option}: got {value!r}, which is not supported (LoRA and DoRA are)")
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INIT:
        raise ValueError(
            f"init_lora_weights: got {init!r}; such an adapter belongs to a changed base weight, "
            "which is not supported (PEFT can convert it when saving)"
        )
    known = _WITHOUT_EFFECT | set(_PLAIN_LORA)
    return sorted(k for k, v in config.items() if k not in known and _is_set(v))


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != []


def matches(names: str | Iterable[str], module: str) -> bool:
    """Whether a module is named: by suffix in a list, by a whole match of a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of rank_pattern or alpha_pattern that fits the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
