"""Which layers of a model an adapter goes on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layer_kinds import CONV1D, kind_of
from lora_kernels.adapters.layers import get_module, named_modules, unwrap
from lora_kernels.adapters.modules_to_save import is_inside, match_modules
from lora_kernels.adapters.reads import Read, read_layers, read_only
from lora_kernels.integrations.peft import matches
from lora_kernels.integrations.transformers import output_layer, task_heads

_SHOWN = 12


@dataclass(frozen=True)
class Targets:
    """Names of the layers to adapt, and (name, reason) of linear layers that are left alone."""

    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def find_targets(model: nn.Module, config: LoRAConfig, *, lenient: bool = False) -> Targets:
    """Match `target_modules` and `exclude_modules` against the model's layers. Layers inside
    `modules_to_save` get no adapter.

    Args:
        lenient: ignore names that fit no layer if another name does, as PEFT does.

    Raises:
        ValueError: a target names nothing, only excluded layers, or a layer that cannot be
            adapted; the message lists the candidates.
    """
    modules = {name: module for name, module in named_modules(model) if name}
    reads = read_layers(model)
    refusals = {name: kind_of(m).refusal(m) or read_only(m, reads) for name, m in modules.items()}
    trained = match_modules(model, config.modules_to_save or ())
    whole = {name for name in modules if is_inside(name, trained)}
    candidates = [n for n, reason in refusals.items() if reason is None and n not in whole]
    read = {n: reads[id(m)].reason for n, m in modules.items() if _is_read_linear(m, reads)}
    excluded = {name for name in modules if is_excluded(config, name)}
    if config.all_linear:
        left_out = _heads(model)
        heads = [n for n in candidates if n not in excluded and id(modules[n]) in left_out]
        names = [n for n in candidates if n not in excluded | set(heads) | set(read)]
        skipped = [(n, "excluded") for n in candidates if n in excluded]
        skipped += [(n, "output layer") for n in heads]
        others = [n for n, m in modules.items() if _is_other_linear(m) and n not in whole]
        skipped += [(n, str(refusals[n])) for n in others]
        skipped += [(n, why) for n, why in read.items() if n not in excluded | set(heads) | whole]
        if not names:
            raise ValueError(_no_match(model, config, candidates, skipped))
        return Targets(tuple(names), tuple(skipped))

    matched = [name for name in modules if matches(config.target_modules, name)]
    names = [name for name in matched if name not in excluded | whole]
    unknown = _unknown(config, modules, excluded)
    if not names and whole & set(matched):
        raise ValueError(
            f"target_modules: {config.target_modules!r} matches only {_some(trained)}, which "
            "modules_to_save trains whole (a new head by default; modules_to_save=[] leaves it)"
        )
    if (unknown and not lenient) or not names:
        raise ValueError(_no_match(model, config, candidates, [], unknown))
    wrong = [name for name in names if refusals[name] is not None]
    if wrong:
        listed = _some([f"{name} ({refusals[name]})" for name in wrong], "; ")
        raise ValueError(
            f"target_modules: {len(wrong)} of the matched modules cannot be adapted: {listed}. "
            f"Candidates: {_some(_suffixes(candidates))}"
        )
    if risky := [name for name in names if name in read]:
        warnings.warn(
            f"target_modules: where that code runs, adapters have no effect on "
            f"{_some([f'{name} ({read[name]})' for name in risky], '; ')}",
            stacklevel=3,
        )
    skipped = [(n, "excluded") for n in matched if n in excluded]
    skipped += [(n, "trains whole") for n in matched if n in whole - excluded]
    return Targets(tuple(names), tuple(skipped))


def _is_other_linear(module: nn.Module) -> bool:
    """A linear layer of a kind that takes no adapter here (Conv1D, GGUF, 8-bit, ...)."""
    kind = kind_of(module)
    named = kind is CONV1D or "Linear" in type(module).__name__
    is_layer = kind.linear or next(module.children(), None) is None
    return named and is_layer and kind.refusal(module) is not None


def _is_read_linear(module: nn.Module, reads: Mapping[int, Read]) -> bool:
    """Whether a linear layer that could have an adapter has its weight read by its owner."""
    return id(module) in reads and kind_of(module).refusal(module) is None


def _heads(model: nn.Module) -> set[int]:
    """ids of the output layers that "all-linear" leaves alone, as in PEFT, and of their parts."""
    model = unwrap(model)
    found = [output_layer(model), *(get_module(model, name) for name in task_heads(model))]
    return {id(m) for head in found if head is not None for m in head.modules()}


def kept_dense(model: nn.Module, config: LoRAConfig) -> set[int]:
    """ids of the layers that are quantised only if they get an adapter: output layers and heads,
    and modules that train whole."""
    trained = match_modules(model, config.modules_to_save or ())
    return _heads(model) | {id(m) for n, m in named_modules(model) if is_inside(n, trained)}


def is_excluded(config: LoRAConfig, name: str) -> bool:
    """Whether `exclude_modules` names this module."""
    return bool(config.exclude_modules) and matches(config.exclude_modules, name)


def _unknown(config: LoRAConfig, modules: Iterable[str], excluded: set[str]) -> list[str]:
    """The entries of a list of targets that match no layer, or only excluded ones."""
    if isinstance(config.target_modules, str):
        return []
    names = [name for name in modules if name not in excluded]
    return [t for t in config.target_modules if not any(matches([t], n) for n in names)]


def _no_match(
    model: nn.Module,
    config: LoRAConfig,
    candidates: list[str],
    skipped: list[tuple[str, str]],
    unknown: list[str] | None = None,
) -> str:
    kind = type(model).__name__
    if config.all_linear:
        text = f"target_modules: {kind} has no linear layer to adapt"
        if skipped:
            text += f"; left alone: {_some([f'{n} ({why})' for n, why in skipped], '; ')}"
        return text
    wanted = unknown or config.target_modules
    text = f"target_modules: {wanted!r} matches no layer of {kind}"
    hidden = [n for n in candidates if matches(wanted, n) and is_excluded(config, n)]
    if hidden:
        text += f" but those that exclude_modules={config.exclude_modules!r} names"
    elif isinstance(wanted, str) and any(matches([wanted], n) for n in candidates):
        text += (
            f" (a string is a regular expression for the whole name: pass [{wanted!r}] to match "
            "the end of a name)"
        )
    return f"{text}. Candidates: {_some(_suffixes(candidates))}"


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _some(items: list[str], separator: str = ", ") -> str:
    if not items:
        return "none"
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def shortest_targets(model: nn.Module, adapted: Iterable[str]) -> str | tuple[str, ...]:
    """`target_modules` that PEFT matches to exactly these modules.

    A layer is named by the last part of its name if every module with that name is adapted, else
    by its full name. If even full names match too much, a regular expression lists them.
    """
    wanted = set(adapted)
    names = {name for name, _ in named_modules(model) if name}
    targets: list[str] = []
    for suffix in _suffixes(wanted):
        bearers = {name for name in names if matches([suffix], name)}
        targets += [suffix] if bearers <= wanted else sorted(bearers & wanted)
    if {name for name in names if matches(targets, name)} != wanted:
        return "|".join(re.escape(name) for name in sorted(wanted))
    return tuple(targets)
