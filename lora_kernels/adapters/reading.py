"""Reading and checking the two files of an adapter in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.integrations.peft import (
    MAGNITUDE,
    PICKLED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    key_of,
    split_key,
)
from lora_kernels.ops.common.checks import FLOATS, names

Factors = dict[str, Tensor]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's name before the messages of errors raised inside the block."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


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


def weights_file(folder: Path) -> Path:
    """The path of the weights: the safetensors file, unless there is only PEFT's older kind."""
    pickled = folder / PICKLED_WEIGHTS_FILE
    whole = folder / WEIGHTS_FILE
    return pickled if pickled.is_file() and not whole.is_file() else whole


def read_weights(path: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """({module: {"A": tensor, "B": tensor}}, all other tensors by key)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return split_weights(_tensors(path))


def split_weights(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """As `read_weights`, for tensors by PEFT's keys."""
    factors: dict[str, Factors] = {}
    other: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        where = split_key(key)
        if where is None:
            other[key] = tensor
        else:
            factors.setdefault(where[0], {})[where[1]] = tensor
    return factors, other


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.name != PICKLED_WEIGHTS_FILE:
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is damaged or no safetensors file ({error})") from error
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{path}: is damaged, or holds more than tensors ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
    ):
        raise ValueError(f"{path}: holds {type(tensors).__name__}, expected names and tensors")
    return tensors


def drop_other_kinds(factors: dict[str, Factors], kinds: tuple[str, ...]) -> list[str]:
    """Remove the tensors whose kind the configuration does not have; return their keys."""
    dropped = []
    for name in list(factors):
        for kind in set(factors[name]) - set(kinds):
            del factors[name][kind]
            dropped.append(key_of(name, kind))
        if not factors[name]:
            del factors[name]
    return dropped


def check_factors(config: LoRAConfig, factors: dict[str, Factors]) -> None:
    """Check dtype, shape and values of each tensor, and the ranks that the configuration says."""
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
