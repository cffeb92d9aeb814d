"""Rows of an embedding that train by themselves: PEFT's trainable_token_indices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules
from lora_kernels.adapters.modules_to_save import is_inside, match_modules
from lora_kernels.adapters.reads import Read
from lora_kernels.integrations.transformers import input_embedding
from lora_kernels.nn.common import fill, whole
from lora_kernels.nn.lora import default_adapter_dtype
from lora_kernels.nn.token_rows import DELTA, TokenRows, check_rows, drop_rows, train_rows


@dataclass(frozen=True)
class Rows:
    """Rows of one module that are to train.

    Attributes:
        name: the module's.
        tokens: the numbers of the rows.
        owner: the module that shares its weight, and the trained rows, with this one; or None.
    """

    name: str
    tokens: tuple[int, ...]
    owner: str | None = None


def find_rows(model: nn.Module, config: LoRAConfig) -> list[Rows]:
    """The rows that `trainable_token_indices` asks for; owners come first.

    A layer that shares its weight with a named one trains the same rows, unless it is named with
    other tokens itself.

    Raises:
        ValueError: a name fits no module, or the model does not name its embedding.
    """
    asked = config.trainable_token_indices
    if asked is None:
        return []
    if not isinstance(asked, Mapping):
        embedding = input_embedding(model)
        found = [n for n, m in named_modules(model) if m is embedding and n]
        asked = {(found or ["embed_tokens"])[0]: asked}
    wanted: dict[str, tuple[int, ...]] = {}
    for end, tokens in asked.items():
        names = match_modules(model, [end])
        if not names:
            raise ValueError(
                f"trainable_token_indices: {end!r} is the end of no module's name in "
                f"{type(model).__name__}"
            )
        wanted |= dict.fromkeys(names, tokens)
    rows: list[Rows] = []
    first = input_embedding(model)
    for name in sorted(wanted, key=lambda n: get_module(model, n) is not first):
        if any(row.name == name for row in rows):
            continue
        rows.append(Rows(name, wanted[name]))
        if get_module(model, name) is first:
            tied = _tied(model, name)
            same = [n for n in tied if wanted.get(n, wanted[name]) == wanted[name]]
            rows += [Rows(n, wanted[name], owner=name) for n in same]
    return rows


def _tied(model: nn.Module, name: str) -> list[str]:
    weight = getattr(get_module(model, name), "weight", None)
    return [
        n
        for n, m in named_modules(model)
        if n != name and weight is not None and m._parameters.get("weight") is weight
    ]


def check_tokens(
    model: nn.Module,
    rows: Iterable[Rows],
    adapted: Iterable[str],
    whole_ones: Iterable[str],
    reads: Mapping[int, Read],
) -> None:
    """Raise unless the rows can train beside the adapters and the modules that train whole."""
    for row in rows:
        module = get_module(model, row.name)
        if row.name in adapted:
            raise ValueError(
                f"trainable_token_indices: {row.name} gets an adapter, or shares its weight with "
                "what these rows are of; name it in one of the options only"
            )
        if is_inside(row.name, whole_ones):
            raise ValueError(
                f"trainable_token_indices: {row.name} is in modules_to_save, which trains all of it"
            )
        check_rows(row.name, module, row.tokens)
        if id(module) in reads:
            raise ValueError(f"trainable_token_indices: {row.name}: {reads[id(module)].reason}")


def train_tokens(model: nn.Module, rows: Iterable[Rows], dtype: torch.dtype | None) -> None:
    """Make the checked rows parameters of their own."""
    made: dict[str, TokenRows] = {}
    for row in rows:
        module = get_module(model, row.name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        made[row.name] = train_rows(
            module,
            row.tokens,
            dtype=dtype or default_adapter_dtype(weight.dtype),
            shared=made[row.owner] if row.owner else None,
        )


def token_modules(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """(name, module) of the modules with rows that train."""
    for name, module in named_modules(model):
        if kind_of(module).trains_rows:
            yield name, cast(TokenRows, module)


def token_owners(model: nn.Module) -> list[tuple[str, TokenRows]]:
    """`token_modules` without those that share another module's rows."""
    owners: dict[int, tuple[str, TokenRows]] = {}
    for name, module in token_modules(model):
        owners.setdefault(id(module.trainable_tokens_delta), (name, module))
    return list(owners.values())


@torch.no_grad()
def merge_tokens(model: nn.Module) -> None:
    """Write the rows into the weights for good. Layers that share a weight and the rows go on
    sharing the weight."""
    for _, owner in token_owners(model):
        weight, delta = owner._parameters["weight"], owner.trainable_tokens_delta
        assert weight is not None
        sharers = [m for _, m in named_modules(model) if m._parameters.get("weight") is weight]
        followers = [m for m in sharers if getattr(m, DELTA, None) is delta]
        merged = whole(weight).detach().clone()
        merged[owner.token_indices] = whole(delta).to(merged.dtype)
        if len(followers) == len(sharers):
            fill(weight, merged)
        else:
            weight = Parameter(merged, requires_grad=False)
        for module in followers:
            module._parameters["weight"] = weight
            drop_rows(module)  # type: ignore[arg-type]


def drop_tokens(model: nn.Module) -> None:
    """Remove the rows; the weights never changed."""
    for _, module in list(token_modules(model)):
        drop_rows(module)
