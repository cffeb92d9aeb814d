"""Where those tensors of an adapter's file go that are not the adapter's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules
from lora_kernels.adapters.modules_to_save import is_inside, match_modules, tensors_of
from lora_kernels.adapters.token_indices import find_rows, token_owners
from lora_kernels.integrations.peft import plain_key, saved_key, tokens_key
from lora_kernels.integrations.transformers import vocabulary_layers
from lora_kernels.nn.common import fill, whole
from lora_kernels.nn.token_rows import DELTA
from lora_kernels.ops.nf4 import NF4Weight

_COPY = ".modules_to_save."  # in the key of a second copy that PEFT may write


@dataclass
class Placed:
    """Tensors of a file, by where they go in a model.

    Attributes:
        saved: tensors of modules that train whole, by module and name inside it.
        rows: trained rows of embeddings, by module.
        base: copies of the base's own weights, by (module, "weight" or "bias").
        missing: keys that the file lacks.
        unexpected: keys of the file that go nowhere.
    """

    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    base: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def place(
    model: nn.Module,
    config: LoRAConfig,
    other: Mapping[str, Tensor],
    adapted: Iterable[str],
    *,
    marked: Iterable[str] | None,
) -> Placed:
    """Find where each tensor goes, and which are missing.

    Args:
        other: the file's tensors that are not factors of an adapter.
        adapted: names of the layers with an adapter.
        marked: names of the modules that train whole already. None for a model without adapters:
            those of the configuration will train.

    Raises:
        ValueError, TypeError: a tensor does not fit; the message names the key.
    """
    made = Placed()
    named = match_modules(model, config.modules_to_save or ())
    modules = named if marked is None else list(marked)
    places = {m: tensors_of(get_module(model, m)) for m in modules}
    expected = {saved_key(m, p): (m, p) for m, of in places.items() for p in of}
    tokens = _tokens(model, config, fresh=marked is None)
    ends = {id(module) for module in vocabulary_layers(model)}
    adapted = set(adapted)
    open_to = {n for n, m in named_modules(model) if n in adapted or id(m) in ends}
    for key, t in other.items():
        if key in expected:
            module, inside = expected.pop(key)
            _check(key, t, places[module][inside])
            made.saved.setdefault(module, {})[inside] = t
            continue
        row_of = next((n for n in tokens if key == tokens_key(n)), None)
        if row_of is not None:
            shape = [len(tokens[row_of]), _weight(model, row_of).shape[1]]
            if list(t.shape) != shape or not t.is_floating_point():
                raise ValueError(f"{key}: got shape {list(t.shape)}, expected {shape}")
            _check_finite(key, t)
            made.rows[row_of] = t
            continue
        if _COPY in key and key.replace(_COPY, ".") in other:
            continue
        module, _, tensor = (plain_key(key) or "").rpartition(".")
        wanted = is_inside(module, named) and not is_inside(module, modules)
        own: Any = get_module(model, module) if module in open_to and not wanted else None
        if own is None or tensor not in ("weight", "bias") or getattr(own, tensor, None) is None:
            if not (is_inside(module, modules) and ".original_module." in key):
                made.unexpected.append(key)
        elif tensor == "weight" and kind_of(own).four_bit:
            _check_quantised(key, t, own.weight)
        else:
            _check(key, t, getattr(own, tensor))
            made.base[module, tensor] = t
    # A model with adapters may not train modules that the configuration names. Tensors of them are
    # unexpected if the file has them, and missing if it has not.
    frozen = {m: tensors_of(get_module(model, m)) for m in named if not is_inside(m, modules)}
    lacking = [k for m, of in frozen.items() for p in of if (k := saved_key(m, p)) not in other]
    made.missing = [*expected, *lacking, *_missing_rows(model, tokens, made)]
    return made


def _tokens(model: nn.Module, config: LoRAConfig, *, fresh: bool) -> dict[str, tuple[int, ...]]:
    """The tokens whose rows train, by module."""
    wanted = {row.name: row.tokens for row in find_rows(model, config)}
    if fresh:
        return wanted
    have = {name: module.trained_tokens for name, module in token_owners(model)}
    for name, tokens in have.items():
        if name in wanted and wanted[name] != tokens:
            raise ValueError(
                f"trainable_token_indices: the adapter has {list(wanted[name])} of {name}, the "
                f"model {list(tokens)}; load it into a model without adapters"
            )
    return have


def _missing_rows(model: nn.Module, tokens: Iterable[str], made: Placed) -> list[str]:
    weights = {id(_weight(model, name)) for name in made.rows}
    return [tokens_key(n) for n in tokens if id(_weight(model, n)) not in weights]


def _weight(model: nn.Module, name: str) -> Any:
    return get_module(model, name)._parameters["weight"]


def _check(key: str, t: Tensor, own: Tensor) -> None:
    if t.shape != own.shape:
        rows = t.dim() == 2 == own.dim() and t.shape[1] == own.shape[1]
        hint = f"; model.resize_token_embeddings({len(t)}) comes before loading" if rows else ""
        raise ValueError(
            f"{key}: got shape {list(t.shape)}, the model's has {list(own.shape)}{hint}"
        )
    if t.is_floating_point() != own.is_floating_point():
        raise TypeError(f"{key}: got dtype {str(t.dtype)[6:]}, the model's is {str(own.dtype)[6:]}")
    _check_finite(key, t)


def _check_finite(key: str, t: Tensor) -> None:
    if t.is_floating_point() and not bool(torch.isfinite(t).all()):
        raise ValueError(f"{key}: holds non-finite values")


def _check_quantised(key: str, t: Tensor, own: NF4Weight) -> None:
    """Raise ValueError unless a tensor, quantised, is the model's own 4-bit weight."""
    same = tuple(t.shape) == tuple(own.shape) and t.is_floating_point()
    if same:
        values = t.to(own.device, own.dtype)
        again = NF4Weight.quantize(values, own.block_size, own.is_nested, own.quant_type)
        codes = own.dequantize(torch.float32)
        same = torch.equal(again.dequantize(torch.float32), codes)
        same = same or torch.equal(values, own.dequantize())  # a decoded copy was saved
    if not same:
        raise ValueError(
            f"{key}: is not the base weight that the model has in 4 bits, and cannot take its "
            "place; load the adapter into a dense model (quantize= stores that in 4 bits)"
        )


def fill_base(model: nn.Module, placed: Placed) -> None:
    """Copy the file's base weights into the model."""
    for (module, tensor), t in placed.base.items():
        own = getattr(get_module(model, module), tensor)
        if not torch.equal(whole(own).detach(), t.to(own.device, own.dtype)):
            fill(own, t)


def fill_trained(model: nn.Module, placed: Placed) -> None:
    """Copy what trains beside the adapters into the model, which has parameters for it now."""
    for module, of in placed.saved.items():
        own = tensors_of(get_module(model, module))
        for inside, t in of.items():
            fill(own[inside], t)
    for module, t in placed.rows.items():
        fill(getattr(get_module(model, module), DELTA), t)
