"""PEFT's adapter checkpoint: file names, tensor keys and the options of its configuration.

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
# The key holds the adapter's name only if a whole PEFT model was saved by hand.
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
    "monteclora_config": (),
    "target_parameters": (),
    "use_bdlora": (),
    "use_dora": (True,),
    "use_qalora": (),
    "velora_config": (),
}
# Initialisations that do not change the base weight. The others train against a changed one.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
# Options that only matter for making a new adapter.
_ONLY_FOR_MAKING = (
    *("corda_config", "eva_config", "layers_pattern", "layers_to_transform", "loftq_config"),
    "lora_ga_config",
)
# Options that say how an adapter was made, or where its layers are, not what a layer computes.
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
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_rslora",
    }
)


def check_directory(directory: object, name: str = "directory") -> Path:
    """The path of an adapter's directory. Errors name the argument."""
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


def base_key_of(module: str, tensor: str = "weight") -> str:
    """The key under which PEFT saves a copy of an adapted embedding's or output layer's weight."""
    return f"{_PREFIX}{module}.base_layer.{tensor}"


def check_config(config: Mapping[str, Any]) -> list[str]:
    """Refuse anything but LoRA and DoRA. Returns the options that are set and not known here.

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


def check_to_apply(config: Mapping[str, Any], unknown: Iterable[str]) -> None:
    """Refuse options that are not supported for making new adapters, after `check_config`.

    Raises:
        ValueError: names the option.
    """
    for option in (*unknown, *_ONLY_FOR_MAKING):
        if _is_set(config.get(option)):
            raise ValueError(f"{option}: got {config[option]!r}, which is not supported")
    runtime = config.get("runtime_config")
    if runtime is not None and getattr(runtime, "ephemeral_gpu_offload", False):
        raise ValueError("runtime_config: ephemeral_gpu_offload is not supported")
    init = config.get("init_lora_weights", True)
    if init is not True and init != "gaussian":
        raise ValueError(
            f"init_lora_weights: got {init!r}, which is not supported: expected True or 'gaussian'"
        )


def modules_of_task(task: str | None) -> tuple[str, ...]:
    """The names that PEFT adds to `modules_to_save` for a task."""
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        return ("classifier", "score")
    return ("qa_outputs",) if task == "QUESTION_ANS" else ()


def default_targets(model_type: str | None) -> list[str] | None:
    """The modules that PEFT adapts by default in a transformers model of this type."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as NAMES

    return NAMES.get(model_type)


def saved_key(module: str, place: str) -> str:
    """The key of a tensor of a module that was trained whole."""
    return f"{_PREFIX}{module}.{place}"


def tokens_key(module: str) -> str:
    """The key of the rows of an embedding that were trained by themselves."""
    return f"{_PREFIX}{module}.token_adapter.trainable_tokens_delta"


def plain_key(key: str) -> str | None:
    """The base model's name for the tensor of which a key holds a copy; None if the key is not
    PEFT's.

    PEFT writes such copies beside an adapter if the vocabulary was resized.
    """
    if not key.startswith(_PREFIX):
        return None
    name = key.removeprefix(_PREFIX)
    for inside in (".token_adapter.base_layer.", ".base_layer.", ".original_module."):
        name = name.replace(inside, ".")
    return name


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != []


def matches(names: str | Iterable[str], module: str) -> bool:
    """Whether a list names a module by the end of its name, or a regex by all of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key of rank_pattern or alpha_pattern that matches the module."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
