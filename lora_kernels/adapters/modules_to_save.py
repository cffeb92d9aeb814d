"""Modules that train whole beside the adapters and are saved with them: PEFT's modules_to_save.

They stay where they are in the model. Each gets new parameters, and the base's are kept for
`disable_adapters` and `unload`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules, unwrap
from lora_kernels.integrations.transformers import (
    share_weight,
    task_heads,
    untie,
    vocabulary_layers,
)
from lora_kernels.nn.common import fill, whole

_KEPT = "_lora_kernels_kept"  # attribute of a module that trains whole: its `Kept`
_UNTIED = "_lora_kernels_untied"  # set on a model whose output layer training has untied
Place = tuple[str, str]  # (name of a module inside, "" for itself; name of its tensor)


@dataclass
class Kept:
    """The tensors of a module that trains whole with which it does not compute now.

    Attributes:
        tensors: the base's tensors by place; the trained ones while `base_active`.
        base_active: the module computes with the base's tensors.
    """

    tensors: dict[Place, Tensor]
    base_active: bool = False


def with_task_head(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with the head of the model's task among the modules to save.

    The head's weights are new, so an adapter would be useless without them. An empty list stays
    empty.

    Raises:
        ValueError: a name fits no module.
    """
    asked = config.modules_to_save
    if asked is not None and not asked:
        return config
    model = unwrap(model)
    for name in asked or ():
        if not match_modules(model, [name]):
            listed = ", ".join(n for n, m in model.named_children())
            raise ValueError(
                f"modules_to_save: {name!r} is the end of no module's name in "
                f"{type(model).__name__}; among its modules are {listed}"
            )
    heads = [n for n in task_heads(model) if n not in match_modules(model, asked or ())]
    names = tuple(dict.fromkeys((*(asked or ()), *heads)))
    return with_tied(model, replace(config, modules_to_save=names or None))


def with_tied(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with the layers that are tied to its modules, if it asks for them."""
    names = config.modules_to_save
    if not names or not config.ensure_weight_tying:
        return config
    found = match_modules(model, names)
    more = tuple(n for n in _tied_to(model, found) if n not in found)
    return replace(config, modules_to_save=names + more)


def _tied_to(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The embedding or the output layer that shares a weight with one of these modules."""
    ends: list[Any] = vocabulary_layers(model)
    weights = {id(p) for name in names for p in get_module(model, name).parameters()}
    if not any(id(p) in weights for m in ends for p in m.parameters()):
        return []
    return [n for n, m in named_modules(model) if m in ends and id(m.weight) in weights]


def match_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules that PEFT finds for `modules_to_save`.

    Their full names end in one of the names, even in the middle of a part ("head" finds
    "lm_head"). Of two modules one inside the other, only the outer counts.
    """
    ends, found = tuple(names), list[str]()
    for name, _ in named_modules(model):
        if ends and name and name.endswith(ends):
            inside = any(name.startswith(f"{outer}.") for outer in found)
            found += [] if inside else [name]
    return found


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is that of one of the modules, or of something inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def check_whole(model: nn.Module, name: str) -> None:
    """Raise unless the module can train whole."""
    module = get_module(model, name)
    parameters = list(module.named_parameters())
    if not parameters:
        raise ValueError(f"modules_to_save: {name} ({type(module).__name__}) has no parameters")
    for part, p in parameters:
        if not p.is_floating_point():
            raise ValueError(
                f"modules_to_save: {name}.{part} is stored as {str(p.dtype)[6:]}, which cannot "
                "train; load the model with this module left dense (llm_int8_skip_modules of "
                "bitsandbytes' configuration)"
            )
    for part, inner in named_modules(module):
        if "_hf_hook" in vars(inner) and any(p.is_meta for p in inner.parameters()):
            raise ValueError(
                f"modules_to_save: accelerate has offloaded {name}, expected weights that stay"
            )
        if kind_of(inner).adapted or kind_of(inner).trains_rows:
            raise ValueError(f"modules_to_save: {name} has adapters inside, on {part or 'itself'}")


def train_whole(model: nn.Module, names: Iterable[str], *, tied: bool = False) -> None:
    """Give the modules new trainable parameters, with the values of the base's.

    Args:
        tied: modules that share a parameter go on sharing it. If False, each gets its own.
    """
    root: Any = unwrap(model)
    shared = share_weight(root)
    memo: dict[int, Parameter] = {}
    for name in names:
        module = get_module(model, name)
        memo = memo if tied else {}
        base: dict[Place, Tensor] = {}
        for place, inner in named_modules(module):
            for slots in (inner._parameters, inner._buffers):
                for key, t in slots.items():
                    if t is None:
                        continue
                    base[place, key] = t.detach().clone() if slots is inner._buffers else t
                    if isinstance(t, Parameter):
                        if id(t) not in memo:
                            memo[id(t)] = Parameter(t.detach().clone())
                        inner._parameters[key] = memo[id(t)]
                        t.requires_grad_(False)
        vars(module)[_KEPT] = Kept(base)
    # Otherwise tie_weights would overwrite one layer's trained weight with the other's.
    if shared and not share_weight(root) and untie(root):
        vars(root)[_UNTIED] = True


def whole_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that train whole."""
    for name, module in named_modules(model):
        if _KEPT in vars(module):
            yield name, module


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that go into a file, named as in its state dict without wrappers."""
    found: dict[str, Tensor] = {}
    kept: Kept | None = vars(module).get(_KEPT)
    for place, inner in named_modules(module):
        passing = inner._non_persistent_buffers_set
        for key, t in {**inner._parameters, **inner._buffers}.items():
            if t is not None and key not in passing:
                learned = kept.tensors[place, key] if kept is not None and kept.base_active else t
                found[f"{place}.{key}" if place else key] = learned
    return found


def put_back(model: nn.Module) -> None:
    """Restore the base's tensors, frozen, in the modules that train whole."""
    for _, module in list(whole_modules(model)):
        _swap(module, base_active=True)
        del vars(module)[_KEPT]
    if untied(model):
        root: Any = unwrap(model)
        root.config.tie_word_embeddings = True


def keep(model: nn.Module) -> None:
    """Keep the trained tensors for good, frozen, in the modules that train whole."""
    for _, module in list(whole_modules(model)):
        _swap(module, base_active=False)
        del vars(module)[_KEPT]
        module.requires_grad_(False)


def untied(model: nn.Module) -> bool:
    """Whether training has untied the output layer from the embedding. The answer is forgotten."""
    return bool(vars(unwrap(model)).pop(_UNTIED, False))


@contextmanager
def base_modules(model: nn.Module) -> Iterator[None]:
    """Compute with the base's tensors in the modules that train whole, inside the block."""
    before = [(module, vars(module)[_KEPT].base_active) for _, module in whole_modules(model)]
    for module, _ in before:
        _swap(module, base_active=True)
    try:
        yield
    finally:
        for module, active in before:
            if _KEPT in vars(module):
                _swap(module, base_active=active)


@torch.no_grad()
def _swap(module: nn.Module, *, base_active: bool) -> None:
    """Exchange a module's tensors for the kept ones, unless it has the wanted ones already."""
    kept: Kept = vars(module)[_KEPT]
    if kept.base_active is base_active:
        return
    found = [(place, key, get_module(module, place)) for place, key in kept.tensors]
    slots_of = [i._parameters if key in i._parameters else i._buffers for _, key, i in found]
    for (place, key, _), slots in zip(found, slots_of, strict=True):
        now, other = slots[key], kept.tensors[place, key]
        if now is None or now.shape != other.shape:
            raise ValueError(
                f"model: {key} {list(other.shape)} of a {type(module).__name__} in modules_to_save "
                f"is {'gone' if now is None else list(now.shape)} now, so that the base's cannot "
                "come back; resize before apply_lora"
            )
    for (place, key, _), slots in zip(found, slots_of, strict=True):
        now, other = slots[key], kept.tensors[place, key]
        assert now is not None
        if hasattr(now, "full_tensor"):  # fully_shard holds a reference to it: copy into it
            kept.tensors[place, key] = whole(now).clone()
            fill(now, whole(other))
            continue
        if (
            other.device != now.device or other.dtype != now.dtype
        ):  # the model was moved or cast since
            other.data = other.data.to(now.device, now.dtype)
        kept.tensors[place, key] = now
        slots[key] = other  # type: ignore[assignment]
    kept.base_active = base_active
