"""One op, one schema, many implementations.

`define` gives torch an opaque op whose body is `run`: the first backend, in the order of
`BACKENDS`, whose metadata-only `supports` refuses nothing. Selection happens inside the op, so it
never breaks a graph and never guards on a shape. An op's arguments are written once, as the fields
of a NamedTuple; such a call is what every implementation takes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from lora_kernels.dispatch import native
from lora_kernels.dispatch.flops import Formula, register_flops
from lora_kernels.dispatch.op import (
    BACKENDS,
    NAMESPACE,
    NATIVE_NAMESPACE,
    BackendError,
    Explanation,
    Implementation,
    Op,
    check_backend,
)
from lora_kernels.dispatch.schema import schema_of
from lora_kernels.dispatch.settings import Setting

BACKEND_VARIABLE = "LORA_KERNELS_BACKEND"
BY_TENSOR = "_by_tensor"  # suffix of the variant of an op that takes its scale as a tensor

Call = TypeVar("Call")
Function = TypeVar("Function", bound=Callable[[Any], Any])

_ops: dict[str, Op] = {}
# Library objects unregister their ops when they are collected.
_library = torch.library.Library(NAMESPACE, "DEF")
_native_library = torch.library.Library(NATIVE_NAMESPACE, "DEF")


def define(name: str, returns: str, *, flops: Formula | None) -> Callable[[type[Call]], type[Call]]:
    """Decorates the class of an op's calls: defines the op `lora_kernels::<name>` and its native
    twin from the one schema that the class gives.

    Args:
        name: the op's name.
        returns: "Tensor y", or several in parentheses, as `torch.library.define` takes them.
        flops: of a call with shapes in place of tensors, the FLOPs of the matrix products that it
            stands for (`dispatch/flops.py`); None for an op without any.

    The class is a NamedTuple whose fields are the op's arguments, and has a method `fake` that
    returns empty outputs of the right shape, dtype and device.

    Examples:
        >>> from typing import NamedTuple
        >>> @lk.dispatch.define("twice_for_docs", "Tensor", flops=None)
        ... class Twice(NamedTuple):
        ...     x: torch.Tensor
        ...     def fake(self):
        ...         return torch.empty_like(self.x)
        >>> impl = lk.dispatch.Implementation("reference", lambda call: 2 * call.x)
        >>> lk.dispatch.register("twice_for_docs", impl)
        >>> torch.ops.lora_kernels.twice_for_docs(torch.ones(2))
        tensor([2., 2.])
    """

    def decorate(call: type[Call]) -> type[Call]:
        if name in _ops:
            raise ValueError(f"name: op {name!r} is already defined")
        op = _ops[name] = Op(name, schema_of(call, returns), call)
        _library.define(name + op.schema)
        _library.impl(name, functools.partial(_run, op), "CompositeExplicitAutograd")
        fake: Any = lambda *args, **kwargs: op.call(*args, **kwargs).fake()  # noqa: E731
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _native_library.define(name + op.schema)
        register_flops(NAMESPACE, name, op.call, flops)
        _define_by_tensor(op, fake, flops)
        return call

    return decorate


def define_native(name: str, schema: str) -> None:
    """Define an op that the extension alone has: a shorter way to what another op does, outside
    autograd (what else would be in the way is torch's own fallback, which takes 0.6 us)."""
    _native_library.define(name + schema)
    _native_library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def define_twin(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    call: Callable[..., Any],
    flops: Formula | None,
) -> None:
    """Define `lora_kernels::<name>`, another way to call an op, with the body that runs where
    torch finds no kernel for the device; `call` and `flops` are as `register_flops` takes them."""
    _library.define(name + schema)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    register_flops(NAMESPACE, name, call, flops)


def _define_by_tensor(op: Op, fake: Callable[..., Any], flops: Formula | None) -> None:
    """Define the variant of an op that takes its scale as a tensor on the CPU
    (`common/scale.py`)."""
    schema = op.schema.replace("float scale", "Tensor scale")
    schema = schema.replace("float[] scales", "Tensor[] scales")
    if schema == op.schema:
        return
    name = op.name + BY_TENSOR

    def by_value(*args: Any, **kwargs: Any) -> Any:
        call = op.call(*args, **kwargs)
        if hasattr(call, "scales"):
            return _run(op, *call._replace(scales=[float(s) for s in call.scales]))
        return _run(op, *call._replace(scale=float(call.scale)))

    define_twin(name, schema, by_value, fake, op.call, flops)


def register(name: str, implementation: Implementation) -> None:
    """Add a backend's implementation to an op that is already defined.

    Examples:
        >>> from typing import NamedTuple
        >>> @lk.dispatch.define("thrice_for_docs", "Tensor", flops=None)
        ... class Thrice(NamedTuple):
        ...     x: torch.Tensor
        ...     def fake(self):
        ...         return torch.empty_like(self.x)
        >>> impl = lk.dispatch.Implementation("reference", lambda call: 3 * call.x)
        >>> lk.dispatch.register("thrice_for_docs", impl)
        >>> lk.dispatch.chosen("thrice_for_docs", torch.ones(2))
        'reference'
    """
    op = _get(name)
    if implementation.backend in op.implementations:
        raise ValueError(f"{name}: backend {implementation.backend!r} is already registered")
    op.implementations[implementation.backend] = implementation


def register_reference(fn: Function) -> Function:
    """Decorates the reference implementation of an op. The function has the op's name."""
    register(fn.__name__, Implementation("reference", fn))
    return fn


def ops() -> dict[str, Op]:
    """Every op of the package by name.

    Examples:
        >>> "lora_linear_fwd" in lk.dispatch.ops()
        True
    """
    return dict(_ops)


def _get(name: str) -> Op:
    if name not in _ops:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join(sorted(_ops))}")
    return _ops[name]


def implementation(name: str, backend: str) -> Callable[[Any], Any]:
    """A backend's function for an op, whether it takes a call or not."""
    return _ops[name].implementations[backend].fn


def direct(name: str, call: Any) -> Callable[[Any], Any] | None:
    """The native function for a call outside autograd, or None if the call has to go through
    torch's dispatcher. The dispatcher would choose the same function: x is a plain CPU tensor, no
    backend is forced, nothing observes the call, and the native backend does not refuse it.

    The way through torch's dispatcher and back into Python takes as long as a small layer's kernel.
    """
    found = _ops[name].implementations.get("native")
    if found is None or not unobserved(call[0]) or found.supports(call) is not None:
        return None
    return found.fn


def unobserved(x: Any) -> bool:
    """Whether x is a plain CPU tensor and nothing observes a call with it: no backend is forced,
    `explain` does not run, and neither a graph nor a mode of torch records the call."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and x.is_cpu
        and _forced.get() is None
        and _log.get() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def run(name: str, call: Any) -> Any:
    """Run a call of `lora_kernels::<name>` outside autograd, the shortest way there is."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.lora_kernels, name)(*call)
    fn = direct(name, call)
    return _ops[name].overload(*call) if fn is None else fn(call)


def _run(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Run the op on the first backend that accepts the call (or on the one asked for)."""
    call = op.call(*args, **kwargs)
    if forward_ad._current_level >= 0:
        _refuse_forward_mode(op.name, call)
    log = _log.get()
    if log is not None:
        log.append(_explain(op, call))
    forced = _forced.get()
    if forced is not None:
        implementation = op.implementations.get(forced)
        if implementation is not None and implementation.supports(call) is None:
            return implementation.fn(call)
    else:
        for implementation in op.in_order():
            if implementation.supports(call) is None:
                return implementation.fn(call)
    raise BackendError(str(_explain(op, call)))


def _refuse_forward_mode(name: str, call: Any) -> None:
    """Raise in forward-mode differentiation: a kernel would silently drop the tangents."""
    # Inside torch.func.jvp an op cannot see which of its arguments have a tangent.
    if eager_transforms.JVP_NESTING > 0 or any(
        forward_ad.unpack_dual(t).tangent is not None for t in _tensors(call)
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


def _explain(op: Op, call: Any) -> Explanation:
    refusals: dict[str, str | None] = {}
    for backend in BACKENDS:
        implementation = op.implementations.get(backend)
        if implementation is None:
            refusals[backend] = "has no implementation of this op"
        else:
            refusals[backend] = implementation.supports(call)
    return Explanation(op.name, refusals, _forced.get())


def refusal(name: str, backend: str, *args: Any, **kwargs: Any) -> str | None:
    """Why a backend does not take these arguments of the op `lora_kernels::<name>`, or None."""
    return explain(name, *args, **kwargs)[0].refusals[backend]


def chosen(name: str, *args: Any, **kwargs: Any) -> str | None:
    """The backend that `lora_kernels::<name>` would run on these arguments.

    Examples:
        >>> gate = up = torch.randn(3, 96, dtype=torch.float64)
        >>> lk.dispatch.chosen("glu_fwd", gate, up, 0)
        'reference'
    """
    return explain(name, *args, **kwargs)[0].chosen


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> list[Explanation]:
    """Say which backend runs, and why each other one refuses.

    Args:
        op: the name of an op, with that op's own arguments; or any function or module, which is
            then called once with the arguments and every op that it runs is explained.

    Returns:
        One `Explanation` per op that the call ran, in order, and none that another thread ran
        meanwhile; `print(*explain(...), sep="\\n")` reads well.

    Examples:
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.randn(32, 8)
        >>> with lk.use_backend("reference"):
        ...     (found,) = lk.explain(lk.functional.lora_linear, x, weight, a, b)
        >>> found.op, found.chosen
        ('lora_linear_fwd', 'reference')
    """
    if isinstance(op, str):
        found_op = _get(op)
        return [_explain(found_op, found_op.call(*args, **kwargs))]
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

    Examples:
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.randn(32, 8)
        >>> with lk.use_backend("reference"):
        ...     y = lk.functional.lora_linear(x, weight, a, b)
    """
    if name is not None:
        check_backend(name)
    with _forced.use(name):
        yield


def _from_environment() -> str | None:
    name = os.environ.get(BACKEND_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}: got {name!r}, expected one of {', '.join(BACKENDS)} or nothing"
        )
    return name


_forced: Setting[str | None] = Setting("backend", _from_environment(), native.observe)
_log: Setting[list[Explanation] | None] = Setting("explain", None, native.observe)
if _forced.default is not None:
    native.observe(1)
