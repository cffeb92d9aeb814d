"""What a `with` block sets for its own context: its thread, or its asyncio task, and no other.

Autograd runs the backward of CUDA tensors in threads of its own, which have no context. There a
backward takes what its forward had (`keep`, `resume`).
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
        observe: is told of a block that begins (1) and of one that ends (-1), in any thread.
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
    """An autograd function whose backward, where another thread runs it, has the settings of its
    forward."""

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
