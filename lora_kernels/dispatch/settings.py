"""Values that a `with` block sets for its own thread or asyncio task, and for no other.

Autograd runs the backward of CUDA tensors in threads of its own, where these values are not set. A
backward there uses the values that its forward had (`keep`, `resume`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_all: list[Setting[Any]] = []


class Setting(Generic[T]):
    """A value of the running context.

    Args:
        name: for its repr.
        default: where no block has set it.
        observe: called with 1 when a block begins and with -1 when one ends, in any thread.
    """

    def __init__(
        self, name: str, default: T, observe: Callable[[int], None] = lambda change: None
    ) -> None:
        self.default, self._observe = default, observe
        self._variable: ContextVar[T] = ContextVar(name, default=default)
        self.get: Callable[[], T] = self._variable.get
        _all.append(self)

    @contextmanager
    def use(self, value: T) -> Iterator[None]:
        """Set it until the block ends."""
        token = self._variable.set(value)
        self._observe(1)
        try:
            yield
        finally:
            self._observe(-1)
            self._variable.reset(token)


class KeepsSettings(torch.autograd.Function):
    """An autograd function whose backward has the settings of its forward, also if another thread
    runs it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = staticmethod(_keeping(cls.forward))  # type: ignore[method-assign]
        cls.backward = staticmethod(_resuming(cls.backward))  # type: ignore[method-assign]


def _keeping(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def keep(ctx: Any, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            changed = [(s, s.get()) for s in _all if s.get() is not s.default]
            ctx.settings = (threading.get_ident(), changed) if changed else None
        return forward(ctx, *args)

    return keep


def _resuming(backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def resume(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        kept = getattr(ctx, "settings", None)
        if kept is None or kept[0] == threading.get_ident():
            return backward(ctx, *grads)
        with ExitStack() as stack:
            for setting, value in kept[1]:
                if setting.get() is setting.default:
                    stack.enter_context(setting.use(value))
            return backward(ctx, *grads)

    return resume
