"""Reading and checking the two files of an adapter in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.integrations.peft import MAGNITUDE, PICKLED_WEIGHTS_FILE, key_of, split_key
from lora_kernels.ops.common.checks import FLOATS, names

Factors = dict[str, Tensor]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected an adapter saved by PEFT")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: holds a {type(options).__name__}, expected an object")
    return options


def read_weights(path: Path) -> tuple[dict[str, Factors], list[str]]:
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


def drop_other_kinds(factors: dict[str, Factors], kinds: tuple[str, ...]) -> list[str]:
    """Take out tensors that the configuration has no use for; return their keys."""
    dropped = []
    for name in list(factors):
        for kind in set(factors[name]) - set(kinds):
            del factors[name][kind]
            dropped.append(key_of(name, kind))
        if not factors[name]:
            del factors[name]
    return dropped


def check_factors(config: LoRAConfig, factors: dict[str, Factors]) -> None:
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
