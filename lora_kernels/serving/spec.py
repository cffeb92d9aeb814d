"""PoolSpec: the modules of a pool, which an adapter has to fit."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules
from lora_kernels.adapters.targets import find_targets, is_excluded
from lora_kernels.integrations.peft import ALL_LINEAR, base_key_of, matches, saved_key
from lora_kernels.integrations.transformers import vocabulary_layers
from lora_kernels.nn.multi_lora_embedding import check_embedding
from lora_kernels.ops.common.checks import FLOATS, check_dtype
from lora_kernels.ops.gather import PAGE, pages_of

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class PoolSpec:
    """The modules of a pool, and what all its adapters have in common.

    Attributes:
        modules: (in_features, out_features) by name.
        all_linear: the modules that "all-linear" means; none if the pool was made without a model.
        max_rank, dtype, device: of the pages.
        embeddings: the modules that are embeddings. Their in_features is the vocabulary's size.
        saved: the model's own weights of which an adapter's file may hold a copy, by PEFT's key.
    """

    modules: Shapes
    all_linear: frozenset[str]
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    embeddings: frozenset[str] = frozenset()
    saved: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def columns(self) -> int:
        """The most pages of a module that an adapter can have."""
        return pages_of(self.max_rank)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of each module."""
        return sum(PAGE * (k + n) * self.dtype.itemsize for k, n in self.modules.values())

    def table_bytes(self, slots: int) -> int:
        """Bytes of the page tables, ranks and scales of all modules."""
        return len(self.modules) * slots * (4 * self.columns + 4 + 4)

    def pages_in(self, memory: int, slots: int) -> int:
        """How many pages of each module fit in so many bytes beside the tables."""
        tables = self.table_bytes(slots)
        least = tables + self.page_bytes
        if positive("memory", memory) < least:
            raise ValueError(f"memory: got {memory} bytes, expected at least {least}")
        return (memory - tables) // self.page_bytes

    def modules_of(self, names: Iterable[str]) -> list[str]:
        """The names that are modules of the pool, in the pool's order."""
        found = set(names)
        return [name for name in self.modules if name in found]


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int of at least 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return value


def make_spec(
    model: nn.Module | Shapes,
    *,
    max_rank: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    target_modules: Any,
    exclude_modules: Any,
) -> PoolSpec:
    """Check the arguments of a pool. A model is not changed."""
    positive("max_rank", max_rank)
    saved: dict[str, Tensor] = {}
    embeddings: frozenset[str] = frozenset()
    if isinstance(model, nn.Module):
        check_model(model)
        config = LoRAConfig(target_modules=target_modules, exclude_modules=exclude_modules)
        embeddings, linears = find_modules(model, config)
        every = {*embeddings, *linears}
        found = [n for n, _ in named_modules(model) if n in every]
        layers = {n: get_module(model, n) for n in found}
        modules: Shapes = {n: kind_of(m).features(m) for n, m in layers.items()}
        linear = _all_linear(model) & every
        saved = _copies(model, every)
        values = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        dtype = dtype or next((t.dtype for t in values if t.dtype in FLOATS), None)
        device = device or next((t.device for t in values), None)
    elif isinstance(model, Mapping):
        modules, linear = _checked_shapes(model), frozenset()
    else:
        raise TypeError(
            f"model: got {type(model).__name__}, expected a torch.nn.Module or a mapping from "
            "names to (in_features, out_features)"
        )
    spec = PoolSpec(
        modules,
        linear,
        max_rank,
        dtype or torch.get_default_dtype(),
        _with_index(torch.device(device or "cpu")),
        embeddings,
        saved,
    )
    check_dtype("dtype", torch.empty(0, dtype=spec.dtype), FLOATS)
    if spec.device.type == "meta":
        raise ValueError("device: got meta, expected one that holds values")
    return spec


def _copies(model: nn.Module, pooled: Container[str]) -> dict[str, Tensor]:
    """The model's own weights of which an adapter's file may hold a copy, by PEFT's key."""
    ends = vocabulary_layers(model)
    copies: dict[str, Tensor] = {}
    for name, module in named_modules(model):
        if module in ends or (name in pooled and kind_of(module).embedding):
            for key, t in module._parameters.items():
                if t is not None and key in ("weight", "bias"):
                    where = base_key_of(name, key) if name in pooled else saved_key(name, key)
                    copies[where] = t
    return copies


def _all_linear(model: nn.Module) -> frozenset[str]:
    config = LoRAConfig(target_modules=ALL_LINEAR, exclude_modules=())
    try:
        return frozenset(find_targets(model, config).names)
    except ValueError:  # the model has an output layer only
        return frozenset()


def _with_index(device: torch.device) -> torch.device:
    """The device with its number: tensors on "cuda" have one, and are compared with the pool's."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def find_modules(model: nn.Module, config: LoRAConfig) -> tuple[frozenset[str], tuple[str, ...]]:
    """(embeddings, linear layers) that a configuration names. "all-linear" names no embedding.

    Raises:
        ValueError: as `find_targets`.
        TypeError: an embedding does more than look up rows.
    """
    if config.all_linear:
        return frozenset(), find_targets(model, config).names
    embeddings = frozenset(
        name
        for name, module in named_modules(model)
        if kind_of(module).embedding
        and matches(config.target_modules, name)
        and not is_excluded(config, name)
    )
    for name in sorted(embeddings):
        check_embedding(name, get_module(model, name))
    if not embeddings:
        return embeddings, find_targets(model, config).names
    targets = config.target_modules
    others = [
        name
        for name, module in named_modules(model)
        if name and matches(targets, name) and name not in embeddings
    ]
    if isinstance(targets, str):
        rest: str | tuple[str, ...] = "|".join(map(re.escape, others))
    else:
        rest = tuple(t for t in targets if not any(matches([t], name) for name in embeddings))
        if not rest and others:  # one name fits embeddings and linear layers
            rest = tuple(others)
    return embeddings, find_targets(
        model, replace(config, target_modules=rest)
    ).names if rest else ()


def _checked_shapes(shapes: Mapping[Any, Any]) -> Shapes:
    if not shapes:
        raise ValueError("model: got no module, expected one or more")
    checked: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"model: got {name!r} as a module's name, expected a string")
        if not isinstance(shape, tuple | list) or len(shape) != 2:
            raise TypeError(f"model[{name!r}]: got {shape!r}, expected (in_features, out_features)")
        k, n = shape
        checked[name] = positive(f"{name}.in_features", k), positive(f"{name}.out_features", n)
    return checked
