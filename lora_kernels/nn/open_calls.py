"""The calls, now running in this thread, of modules whose projections run as one.

A layer asks here for what a sibling has computed for it (`nn/fused.py`). It knows nothing of its
owner, so that it can be copied, pickled, moved and replaced like any other.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor, nn


class Call(Protocol):
    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """layer(x), computed with its siblings', or None if the layer has to compute alone."""

    def drop(self) -> None:
        """Forget what is kept."""


class _Open(threading.local):
    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}


_open = _Open()


def begin(owner: nn.Module, call: Call) -> None:
    """The owner's forward begins."""
    # Results of an interrupted call are dropped here, because no hook runs after Ctrl-C. A call
    # that is still running around this one loses nothing: it calls its siblings one right after the
    # other.
    for other in _open.calls.values():
        other.drop()
    _open.calls[id(owner)] = call


def end(owner: nn.Module) -> None:
    """The owner's forward has ended, with a result or an error."""
    _open.calls.pop(id(owner), None)


def take(layer: nn.Module, x: Tensor) -> Tensor | None:
    """layer(x), computed with its siblings', or None if the layer has to compute alone. In a graph
    that torch.compile makes it always has to: there is no version that tells whether x changed."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return None
    for call in _open.calls.values():
        y = call.take(layer, x)
        if y is not None:
            return y
    return None
