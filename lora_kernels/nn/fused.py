"""Sibling layers of any module, run by one packed op: the first that is called computes for all.

While the owner's forward runs, the first sibling called with x computes every sibling's output. The
other results are kept, and each sibling takes its own if it is called with the very same x. They
are dropped when the forward ends, so a result never comes from other weights or another call. Two
hooks on the owner mark where its forward begins and ends; module tree, parameters and state dict
stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.nn import open_calls
from lora_kernels.nn.packed import packed_arguments, why_not_plain

Group = tuple[str, ...]


class BeginGroups:
    """A hook before an owner's forward.

    Args:
        groups: names of the owner's children that take one input, in the order of their calls.
    """

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self.groups = groups

    def __call__(self, owner: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            open_calls.begin(owner, _Call(owner, self.groups))


class EndGroups:
    """A hook after an owner's forward, whether that succeeds or raises."""

    def __call__(self, owner: nn.Module, args: Any, result: Any) -> None:
        if not torch.compiler.is_compiling():
            open_calls.end(owner)


class _Kept:
    """What was computed for a group's layers, and what has to be unchanged when a layer takes its
    part."""

    __slots__ = ("outputs", "state", "traits", "x")

    def __init__(self, x: Tensor, traits: Any, outputs: dict[nn.Module, Tensor]) -> None:
        self.x, self.state = x, _state(x)
        self.traits, self.outputs = traits, outputs

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        y = self.outputs.pop(layer)
        if x is self.x and _state(x) == self.state and _traits(layer, x) == self.traits:
            return y
        return None


class _Call:
    """One run of an owner's forward. Each group computes at most once in it."""

    __slots__ = ("groups", "kept", "owner")

    def __init__(self, owner: nn.Module, groups: tuple[Group, ...]) -> None:
        self.owner, self.groups = weakref.ref(owner), groups
        self.kept: list[_Kept] = []

    def drop(self) -> None:
        self.kept = []

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        for kept in self.kept:
            if layer in kept.outputs:
                y = kept.take(layer, x)
                if not kept.outputs:
                    self.kept.remove(kept)
                return y
        owner = self.owner()
        children: dict[str, Any] = {} if owner is None else owner._modules
        for group in self.groups:
            found = dict.fromkeys(map(children.get, group))  # a layer may have several names
            if layer in found:
                return self._compute(group, found, layer, x)
        return None

    def _compute(
        self, group: Group, found: Iterable[Any], layer: nn.Module, x: Tensor
    ) -> Tensor | None:
        traits = _traits(layer, x)
        if traits is None:
            return None
        layers: list[Any] = [
            m for m in found if m is layer or (m is not None and _traits(m, x) == traits)
        ]
        if len(layers) < 2:
            return None
        self.groups = tuple(other for other in self.groups if other is not group)
        try:
            y = functional.lora_packed_linear(x, **packed_arguments(layers, x))
        except (TypeError, ValueError):  # alone, the layer raises its own error
            return None
        outputs = dict(zip(layers, y, strict=True))
        mine = outputs.pop(layer)
        self.kept.append(_Kept(x, traits, outputs))
        return mine


def _state(x: Tensor) -> tuple[Any, ...]:
    """The version of x, which counts the writes to it (None in inference mode, which counts
    none), and the modes of torch that a result depends on."""
    kind = "cpu" if x.is_cpu else x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return (
        None if x.is_inference() else x._version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(kind) if autocast else None,
    )


def _traits(layer: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What layers have to share to run as one on x; None if this one has to run alone now."""
    if why_not_plain(layer) is not None:
        return None
    found = shared_traits(layer)
    if x.requires_grad or not torch.is_grad_enabled():
        return found
    # A frozen layer does not share with trained ones: autograd would compute its gradients, unused.
    return *found, any(p is not None and p.requires_grad for p in layer._parameters.values())


def shared_traits(layer: Any) -> tuple[Any, ...]:
    """What layers have to share to run as one, whatever the input."""
    return layer.dropout, layer.training, layer._parameters["lora_A"].dtype
