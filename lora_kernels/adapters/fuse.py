"""fuse_projections: layers of a model that take one input run as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import named_modules, unwrap
from lora_kernels.adapters.siblings import can_be_read, sibling_groups
from lora_kernels.adapters.words import by_reason
from lora_kernels.nn.fused import BeginGroups, EndGroups, Group, shared_traits
from lora_kernels.nn.packed import Layer, why_not_plain

_TRAITS = ("dropout", "training", "adapter dtype")  # of shared_traits
_ALONE = "no sibling with an adapter takes the same input"


@dataclass(frozen=True)
class FusedReport:
    """What of a model runs as one, as it is now; `print` shows it.

    Attributes:
        groups: names of the layers of each group that runs as one.
        alone: (name, reason) of the adapted layers that are in no group.

    Examples:
        >>> _ = lk.apply_lora(model, r=8)
        >>> report = lk.fuse_projections(model)
        >>> print(str(report).splitlines()[0])
        run as one: 1 x q_proj + k_proj + v_proj, 1 x gate_proj + up_proj
        >>> report.alone[0]
        ('model.layers.0.self_attn.o_proj', 'no sibling with an adapter takes the same input')
    """

    groups: tuple[Group, ...]
    alone: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        kinds = Counter(" + ".join(map(_last, group)) for group in self.groups)
        what = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return "\n".join([f"run as one: {what or 'none'}", *by_reason("one by one", self.alone)])


def fuse_projections(model: nn.Module) -> FusedReport:
    """Run adapted layers that take one input as one, such as q, k and v of an attention, gate and
    up of an MLP.

    They are the layers that the code of a module calls with one variable. The first that is called
    computes for all (`functional.lora_packed_linear`); each other takes its own part if it is
    called with the very same tensor, and computes alone if not. Results differ from those of the
    layers alone by rounding at most, and in training by dropout's random numbers: one seed is drawn
    for a group, from which each layer has a mask of its own.

    Modules, parameters and the state dict stay as they are: hooks on the modules that own such
    layers are all there is, and copies and pickles have them. It is asked at each call whether
    layers can run as one. Layers whose adapter is merged, disabled or DoRA, that have hooks or a
    forward of their own, or that differ in dropout or dtype, run alone. So do all layers in a graph
    that `torch.compile` makes, and those that are wrapped one by one (checkpointing, FSDP).

    It is for GPUs. The CPU's kernels take one projection after the other, so that on the CPU it
    gains nothing, and costs time where a model makes one token after the other.

    The layers of a group share one node of autograd's graph: a gradient through one of them and
    then, in a second backward, through another takes `retain_graph=True`.

    Args:
        model: a model with adapters. To fuse it again is to look for groups again.

    Returns:
        A report; `print` it.

    Raises:
        TypeError: `model` is no module.

    Examples:
        >>> _ = lk.apply_lora(model, r=8)
        >>> report = lk.fuse_projections(model)
        >>> report.groups[1]
        ('model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj')
    """
    unfuse_projections(model)
    for _, owner in named_modules(model):
        groups = []
        for names in _found(owner):
            adapted = tuple(name for name in names if _is_adapted(owner._modules.get(name)))
            if len(adapted) > 1:
                groups.append(adapted)
        if groups:
            owner.register_forward_pre_hook(BeginGroups(tuple(groups)))
            owner.register_forward_hook(EndGroups(), always_call=True)
            for name in (name for group in groups for name in group):
                cast(Layer, owner._modules[name]).in_group = True
    return fused_report(model)


def unfuse_projections(model: nn.Module) -> None:
    """Undo `fuse_projections`: every layer runs alone. Nothing happens to a model that is not
    fused.

    Raises:
        TypeError: `model` is no module.

    Examples:
        >>> _ = lk.apply_lora(model, r=8)
        >>> _ = lk.fuse_projections(model)
        >>> lk.unfuse_projections(model)
    """
    for _, module in named_modules(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, BeginGroups | EndGroups):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        vars(module).pop("in_group", None)


def fused_report(model: nn.Module) -> FusedReport:
    """The report on a model as it is now."""
    groups: list[Group] = []
    alone: dict[str, str] = {}
    for path, owner in named_modules(model):
        children = owner._modules
        adapted = [n for n, m in children.items() if m is not None and _is_adapted(unwrap(m))]
        if not adapted:
            continue
        unread = f"the code of {type(owner).__name__} cannot be read"
        reasons = dict.fromkeys(adapted, _ALONE if can_be_read(owner) else unread)
        for name in adapted:
            if not _is_adapted(children[name]):
                reasons[name] = f"is inside a {type(children[name]).__name__}"
        for names in _fused(owner):
            for together in _split(owner, names, reasons):
                groups.append(tuple(_join(path, name) for name in together))
        alone |= {_join(path, name): reason for name, reason in reasons.items()}
    return FusedReport(tuple(groups), tuple(alone.items()))


def fused_with(model: nn.Module) -> dict[str, str]:
    """What each layer that does not run alone runs as one with, by its name."""
    return {
        name: "+".join(map(_last, group)) for group in fused_report(model).groups for name in group
    }


def _split(owner: nn.Module, names: Group, reasons: dict[str, str]) -> Iterator[Group]:
    """The parts of a group that run as one now. Their reasons are removed; the others' are set."""
    alike: dict[Any, list[str]] = {}
    for name in names:
        layer: Any = owner._modules.get(name)
        if not _is_adapted(layer):
            continue
        reason = why_not_plain(layer)
        if reason is None:
            alike.setdefault(shared_traits(layer), []).append(name)
        else:
            reasons[name] = reason
    most = max(alike, key=lambda traits: len(alike[traits]), default=())
    for traits, together in alike.items():
        if len(together) > 1:
            yield tuple(together)
            for name in together:
                del reasons[name]
        elif len(alike) == 1:
            reasons[together[0]] = "no sibling can run with it now"
        else:
            what, has, others = next(
                (what, a, b) for what, a, b in zip(_TRAITS, traits, most, strict=True) if a != b
            )
            reasons[together[0]] = f"has {what} {has}, {alike[most][0]} has {others}"


def _found(owner: nn.Module) -> tuple[Group, ...]:
    """The children that take one input, if any of them has an adapter."""
    if any(_is_adapted(child) for child in owner._modules.values()):
        return sibling_groups(owner)
    return ()


def _fused(owner: nn.Module) -> tuple[Group, ...]:
    """The groups of an owner that `fuse_projections` has marked."""
    hooks = owner._forward_pre_hooks.values()
    return next((hook.groups for hook in hooks if isinstance(hook, BeginGroups)), ())


def _is_adapted(child: nn.Module | None) -> bool:
    return child is not None and kind_of(child).adapted


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
