"""One op, one schema, many implementations.

`define` gives torch an opaque op whose body is `run`: the first backend, in the order of
`BACKENDS`, whose metadata-only `supports` refuses nothing. Selection happens inside the op, so it
never breaks a graph and never guards on a shape.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from lora_kernels.dispatch.flops import Formula, register_flops
from lora_kernels.dispatch.settings import Setting

NAMESPACE = "lora_kernels"
NATIVE_NAMESPACE = "lora_kernels_native"
BACKENDS = ("native", "triton", "reference")
BACKEND_VARIABLE = "LORA_KERNELS_BACKEND"
BY_TENSOR = "_by_tensor"  # the name's end of an op's twin whose scale is a tensor


class BackendError(RuntimeError):
    """No backend can run the op on these arguments, or the one that was asked for cannot."""


@dataclass(frozen=True)
class Implementation:
    """A backend's function for one op.

    `supports` takes the op's arguments, reads only metadata (shape, dtype, strides, device) and
    returns None, or one line that says why this backend refuses them.
    """

    backend: str
    fn: Callable[..., Any]
    supports: Callable[..., str | None]

    def __post_init__(self) -> None:
        _check_backend(self.backend)


@dataclass
class Op:
    """An op of this package: its schema and the implementations known so far."""

    name: str
    schema: str
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def in_order(self) -> list[Implementation]:
        return [self.implementations[b] for b in BACKENDS if b in self.implementations]


@dataclass(frozen=True)
class Explanation:
    """Each backend's answer for a call of an op: `refusals[backend]` is None when it accepts."""

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


_ops: dict[str, Op] = {}
# Library objects unregister their ops when they are collected.
_library = torch.library.Library(NAMESPACE, "DEF")
_native_library = torch.library.Library(NATIVE_NAMESPACE, "DEF")


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")


def define(name: str, schema: str, fake: Callable[..., Any], *, flops: Formula | None) -> None:
    """Define the op `lora_kernels::<name>` and its native twin from one schema string.

    Args:
        name: the op's name.
        schema: arguments and returns, as `torch.library.define` takes them.
        fake: returns empty outputs of the right shape, dtype and device.
        flops: those of the matrix products that it stands for (`dispatch/flops.py`), from shapes;
            None for an op without any.
    """
    if name in _ops:
        raise ValueError(f"name: op {name!r} is already defined")
    _ops[name] = Op(name, schema)
    _library.define(name + schema)
    _library.impl(name, functools.partial(run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _native_library.define(name + schema)
    register_flops(NAMESPACE, name, schema, flops)
    _define_by_tensor(name, schema, fake, flops)


def _define_by_tensor(
    name: str, schema: str, fake: Callable[..., Any], flops: Formula | None
) -> None:
    """The twin of an op with a scale that takes it as a tensor on the CPU (`common/scale.py`)."""
    twin = schema.replace(" float scale,", " Tensor scale,").replace(
        " float scale)", " Tensor scale)"
    )
    twin = twin.replace(" float[] scales,", " Tensor[] scales,")
    if twin == schema:
        return
    names = [a.name for a in torch._C.parse_schema(name + twin).arguments]
    at = next(i for i, n in enumerate(names) if n in ("scale", "scales"))

    def call(*args: Any) -> Any:
        given = args[at]
        value = [float(s) for s in given] if isinstance(given, (list, tuple)) else float(given)
        return run(name, *args[:at], value, *args[at + 1 :])

    name_of_twin = name + BY_TENSOR
    _library.define(name_of_twin + twin)
    _library.impl(name_of_twin, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name_of_twin}", fake, lib=_library)
    register_flops(NAMESPACE, name_of_twin, twin, flops)


def register(name: str, implementation: Implementation) -> None:
    """Add a backend's implementation to an op that is already defined."""
    op = _get(name)
    if implementation.backend in op.implementations:
        raise ValueError(f"{name}: backend {implementation.backend!r} is already registered")
    op.implementations[implementation.backend] = implementation


def ops() -> dict[str, Op]:
    """Every op of the package by name."""
    return dict(_ops)


def _get(name: str) -> Op:
    if name not in _ops:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join(sorted(_ops))}")
    return _ops[name]


def unwatched() -> bool:
    """Whether nobody asks which backend runs, or for another than the first, in Python or by a
    mode of torch's: then a caller may go straight to an op of that backend."""
    return (
        not torch.compiler.is_compiling()
        and _forced.get() is None
        and _log.get() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """Run the op on the first backend that accepts the arguments (or on the one asked for)."""
    if forward_ad._current_level >= 0:
        _refuse_forward_mode(name, args)
    log = _log.get()
    if log is not None:
        log.append(_explain_op(name, *args, **kwargs))
    op, forced = _ops[name], _forced.get()
    if forced is not None:
        implementation = op.implementations.get(forced)
        if implementation is not None and implementation.supports(*args, **kwargs) is None:
            return implementation.fn(*args, **kwargs)
    else:
        for implementation in op.in_order():
            if implementation.supports(*args, **kwargs) is None:
                return implementation.fn(*args, **kwargs)
    raise BackendError(str(_explain_op(name, *args, **kwargs)))


def _refuse_forward_mode(name: str, args: tuple[Any, ...]) -> None:
    """Raise where a derivative is carried forward: a kernel would drop it without a word."""
    # Inside torch.func.jvp an op cannot see which of its arguments carry one.
    if eager_transforms.JVP_NESTING > 0 or any(
        forward_ad.unpack_dual(t).tangent is not None for t in _tensors(args)
    ):
        raise NotImplementedError(
            f"{name}: forward-mode differentiation (torch.func.jvp, dual_level) is not "
            "implemented, expected reverse mode (torch.autograd.grad)"
        )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _explain_op(name: str, *args: Any, **kwargs: Any) -> Explanation:
    op = _get(name)
    refusals: dict[str, str | None] = {}
    for backend in BACKENDS:
        implementation = op.implementations.get(backend)
        if implementation is None:
            refusals[backend] = "has no implementation of this op"
        else:
            refusals[backend] = implementation.supports(*args, **kwargs)
    return Explanation(name, refusals, _forced.get())


def chosen(name: str, *args: Any, **kwargs: Any) -> str | None:
    """The backend that `lora_kernels::<name>` would run on these arguments."""
    return _explain_op(name, *args, **kwargs).chosen


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Say which backend runs, and why each other one refuses.

    Args:
        op: the name of an op, with that op's own arguments; or any function or module, which is
            then called once with the arguments and every op that it runs is explained.

    Returns:
        One `Explanation` per op that the call ran, in order, and none that another thread ran
        meanwhile; `print(*explain(...), sep="\\n")` reads well.
    """
    if isinstance(op, str):
        return [_explain_op(op, *args, **kwargs)]
    found: list[Explanation] = []
    with _log.use(found):
        op(*args, **kwargs)
    return found


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op of this thread (or asyncio task) on one backend until the block ends.

    There is no fallback: an op that the backend cannot take raises `BackendError`. None gives the
    automatic choice back. A backward of CUDA tensors, which autograd runs in a thread of its own,
    is on the backend of its forward. The environment variable LORA_KERNELS_BACKEND does the same
    from outside, for all threads.

    Raises:
        ValueError: `name` is no backend.
    """
    if name is not None:
        _check_backend(name)
    with _forced.use(name):
        yield


def _from_environment() -> str | None:
    name = os.environ.get(BACKEND_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}: got {name!r}, expected one of {', '.join(BACKENDS)} or nothing"
        )
    return name


_forced: Setting[str | None] = Setting("backend", _from_environment())
_log: Setting[list[Explanation] | None] = Setting("explain", None)
