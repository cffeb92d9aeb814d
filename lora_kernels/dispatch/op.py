"""What an op of this package is: its schema, its implementations, and each backend's answer for a
call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

NAMESPACE = "lora_kernels"
NATIVE_NAMESPACE = "lora_kernels_native"
BACKENDS = ("native", "triton", "reference")


def check_backend(name: str) -> None:
    """Raise ValueError if `name` is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")


class BackendError(RuntimeError):
    """No backend can run the op on these arguments, or the one that was asked for cannot.

    Examples:
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.randn(32, 8)
        >>> try:
        ...     with lk.use_backend("native"):  # which has no fp64
        ...         lk.functional.lora_linear(x.double(), weight.double(), a.double(), b.double())
        ... except lk.dispatch.BackendError as error:
        ...     str(error).splitlines()[0]
        'lora_linear_fwd: no backend (native was asked for)'
    """


@dataclass(frozen=True)
class Implementation:
    """A backend's function for one op.

    Both functions take a call of the op. `supports` reads only metadata (shape, dtype, strides,
    device) and returns None, or one line that says why this backend refuses the call.

    Examples:
        >>> def supports(call):
        ...     return None if call.x.is_cuda else f"x is on {call.x.device}, not on CUDA"
        >>> triton = lk.dispatch.Implementation("triton", lambda call: call.x.clone(), supports)
        >>> triton.supports(lk.dispatch.ops()["lora_linear_fwd"].call(torch.ones(2), *[None] * 10))
        'x is on cpu, not on CUDA'
    """

    backend: str
    fn: Callable[[Any], Any]
    supports: Callable[[Any], str | None] = lambda call: None

    def __post_init__(self) -> None:
        check_backend(self.backend)


@dataclass
class Op:
    """An op of this package: its schema, the class of its calls (a NamedTuple of the op's
    arguments) and the implementations known so far."""

    name: str
    schema: str
    call: Callable[..., Any]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    @functools.cached_property
    def overload(self) -> Any:
        """The op in torch."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def in_order(self) -> list[Implementation]:
        return [self.implementations[b] for b in BACKENDS if b in self.implementations]


@dataclass(frozen=True)
class Explanation:
    """Each backend's answer for a call of an op: `refusals[backend]` is None when it accepts.

    Examples:
        >>> refusals = {"native": "x is on cuda:0, not on the CPU", "reference": None}
        >>> print(lk.dispatch.Explanation("nf4_linear_fwd", refusals))
        nf4_linear_fwd: reference
          native    x is on cuda:0, not on the CPU
          reference accepts
    """

    op: str
    refusals: dict[str, str | None]
    forced: str | None = None

    @property
    def chosen(self) -> str | None:
        """The backend that runs, or None when the call would raise."""
        candidates = [self.forced] if self.forced else list(self.refusals)
        return next((b for b in candidates if self.refusals.get(b, "") is None), None)

    def __str__(self) -> str:
        head = f"{self.op}: {self.chosen or 'no backend'}"
        if self.forced:
            head += f" ({self.forced} was asked for)"
        lines = [f"  {b:<10}{reason or 'accepts'}" for b, reason in self.refusals.items()]
        return "\n".join([head, *lines])
