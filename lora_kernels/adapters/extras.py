"""What an adapter's file holds beside the adapters; refusing what trains and would not be saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules
from lora_kernels.adapters.modules_to_save import (
    is_inside,
    match_modules,
    tensors_of,
    whole_modules,
)
from lora_kernels.adapters.token_indices import token_owners
from lora_kernels.adapters.words import first_few
from lora_kernels.integrations.peft import saved_key, tokens_key
from lora_kernels.integrations.transformers import (
    base_model_name,
    resized_vocabulary,
    vocabulary_layers,
)


@dataclass(frozen=True)
class Extras:
    """What a file holds beside the adapters.

    Attributes:
        tensors: by key in the file.
        modules: the `modules_to_save` with which PEFT finds exactly the modules saved whole.
        tokens: the `trainable_token_indices` of each module, by its name.
    """

    tensors: Mapping[str, Tensor]
    modules: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]


def find_extras(model: nn.Module, asked: LoRAConfig | None, more: Iterable[str] = ()) -> Extras:
    """Everything that has to be saved beside the adapters.

    Args:
        asked: the configuration that the adapters were made from.
        more: further modules to save whole.

    Raises:
        ValueError: something that trains, or has trained, cannot go into the file.
    """
    if isinstance(more, str):
        raise TypeError(f"modules_to_save: got {more!r}, expected a list of names")
    more = tuple(more)
    for name in more:
        if not match_modules(model, [name]):
            raise ValueError(f"modules_to_save: {name!r} is the end of no module's name")
    marked = [name for name, _ in whole_modules(model)]
    more += _sharing(model, match_modules(model, more), marked)
    found = [*marked, *(n for n in match_modules(model, more) if not is_inside(n, marked))]
    names = (*((asked.modules_to_save if asked else None) or ()), *more)
    if set(match_modules(model, names)) != set(found):
        lost = [n for n in match_modules(model, names) if n not in found]
        if lost:
            raise ValueError(
                f"modules_to_save: {first_few(lost)} was replaced since apply_lora, and what it "
                "had learned went with it"
            )
        names = tuple(found)
    modules = match_modules(model, names)  # PEFT expects every module that a name fits
    tensors: dict[str, Tensor] = {}
    for name in modules:
        module = get_module(model, name)
        for part, inner in named_modules(module):
            if kind_of(inner).adapted or kind_of(inner).trains_rows:
                raise ValueError(
                    f"modules_to_save: {name} has adapters inside, on {part or 'itself'}, expected "
                    "a module without"
                )
        tensors |= {saved_key(name, place): t for place, t in tensors_of(module).items()}
    owners = token_owners(model)
    if asked is not None and asked.trainable_token_indices and not owners:
        raise ValueError(
            "trainable_token_indices: the embedding was replaced since apply_lora, and what its "
            "rows had learned went with it"
        )
    tensors |= {tokens_key(name): module.trainable_tokens_delta for name, module in owners}
    tensors |= resized_ends(model, modules)
    _refuse_unsaved(model, modules, tensors)
    return Extras(tensors, names, {name: module.trained_tokens for name, module in owners})


def _sharing(model: nn.Module, named: Iterable[str], marked: Iterable[str]) -> tuple[str, ...]:
    """Further modules that share a parameter with the named ones. A file with only one of two tied
    layers would untie them."""
    inside = (m for n in named if not is_inside(n, marked) for m in get_module(model, n).modules())
    shared = {id(p) for m in inside for p in m._parameters.values() if p is not None}
    return tuple(
        name
        for name, module in named_modules(model)
        if not is_inside(name, (*named, *marked))
        and any(id(p) in shared for p in module._parameters.values())
    )


def resized_ends(model: nn.Module, modules: Iterable[str]) -> dict[str, Tensor]:
    """The embedding and the output layer, by PEFT's keys, if the vocabulary was resized since the
    model was loaded."""
    sizes = resized_vocabulary(model)
    if sizes is None:
        return {}
    ends = vocabulary_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, module in named_modules(model):
        if module not in ends or is_inside(name, modules):
            continue
        kind = kind_of(module)
        own = kind.own_weights(module)
        tensors |= {kind.weight_key(name, key): t for key, t in own.items()}
    if tensors:
        warnings.warn(
            f"the vocabulary has {sizes[1]} tokens, that of {base_model_name(model)} {sizes[0]}: "
            "the embedding and the output layer are saved with the adapters",
            stacklevel=5,
        )
    return tensors


def _refuse_unsaved(
    model: nn.Module, modules: Iterable[str], tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError for parameters that train and would not be saved."""
    saved = {id(t) for t in tensors.values()}
    # By parameter its module, which modules_to_save could name; "" if that has adapters inside.
    unsaved: dict[str, str] = {}
    for name, module in named_modules(model):
        for key, p in module._parameters.items():
            of_adapter = kind_of(module).adapted and key.startswith("lora_")
            if p is None or not p.requires_grad or of_adapter or id(p) in saved:
                continue
            kinds = [kind_of(inner) for _, inner in named_modules(module)]
            alone = not any(kind.adapted or kind.trains_rows for kind in kinds)
            unsaved[f"{name}.{key}" if name else key] = name if alone else ""
    if not unsaved:
        return
    able = sorted({name for name in unsaved.values() if name})
    unable = [name for name, owner in unsaved.items() if not owner]
    text = f"model: {first_few(list(unsaved))} trains, and would not be saved with the adapters. "
    if able:
        text += (
            f"modules_to_save={able!r} of save_adapter saves it too (that of apply_lora trains it "
            "from the start). "
        )
    if unable:
        text += f"PEFT's format has no place for {first_few(unable)}: model.state_dict() has it. "
    raise ValueError(text + "requires_grad_(False) leaves it out")
