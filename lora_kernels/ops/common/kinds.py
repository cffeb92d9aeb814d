"""Names an argument of the wrong type after a call has failed, so that a correct call pays nothing.

try:
    ...
except Exception:
    check_kinds(function, locals())
    raise
"""

from __future__ import annotations

import dataclasses
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

_PLAIN = (bool, int, float, str, type(None))


def check_kinds(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise TypeError that names the first argument whose value its annotation does not allow.

    Args:
        function: annotated.
        given: its arguments by name, and any other names.
    """
    if torch.compiler.is_compiling():  # the call fails again outside the graph
        return
    for name, hint in _hints(function).items():
        if name in given and name != "return":
            check_kind(name, given[name], hint)


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError unless a value is what an annotation says, entry by entry."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if any(_is(value, option) for option in options):
            return _check_inside(name, value, options)
    elif _is(value, hint):
        return _check_inside(name, value, [hint])
    raise TypeError(f"{name}: got {describe(value)}, expected {_words(hint)}")


def describe(value: Any) -> str:
    """A value as an error shows it: itself where it is short, else its kind."""
    if isinstance(value, _PLAIN):
        return reprlib.repr(value)
    kind = type(value)
    name = kind.__name__ if kind.__module__ in ("builtins", "torch") else _full_name(kind)
    shape = getattr(value, "shape", None)
    return f"{name} {list(shape)}" if isinstance(shape, tuple) else name


def _full_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _is(value: Any, hint: Any) -> bool:
    """Whether the value itself fits; its entries are looked at by `_check_inside`."""
    if hint is None:
        return value is None
    if hint is bool:
        return isinstance(value, numbers.Integral) or type(value).__name__ == "bool_"
    if hint is float or hint is int:
        if isinstance(value, Tensor):  # its value is taken
            return value.numel() == 1 and (hint is float or not value.is_floating_point())
        number = numbers.Real if hint is float else numbers.Integral
        return isinstance(value, number | (torch.SymFloat if hint is float else torch.SymInt))
    origin = typing.get_origin(hint) or hint
    if origin is Sequence or origin is Iterable:
        # Both are sequences, and neither is ever meant as one.
        return isinstance(value, origin) and not isinstance(value, str | Tensor)
    return hint is Any or not isinstance(origin, type) or isinstance(value, origin)


def _check_inside(name: str, value: Any, options: Sequence[Any]) -> None:
    parts: Iterable[tuple[str, Any, Any]] = ()
    hint = next(option for option in options if _is(value, option))
    if typing.get_origin(hint) is Sequence:
        [of] = typing.get_args(hint)
        parts = ((f"{name}[{i}]", entry, of) for i, entry in enumerate(value))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        hints = _hints(type(value))
        parts = ((f"{name}.{f}", getattr(value, f), hints[f]) for f in value._fields)
    elif dataclasses.is_dataclass(value):
        kind: Any = type(value)
        hints = _hints(kind)
        made = [f.name for f in dataclasses.fields(value) if f.init]
        parts = ((f"{name}.{f}", getattr(value, f), hints[f]) for f in made)
    for part, entry, of in parts:
        check_kind(part, entry, of)


def _words(hint: Any) -> str:
    """What an annotation allows, in words."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    if hint is None or hint is type(None):
        return "None"
    if hint is float:
        return "a number"
    if hint is int:
        return "an int"
    if hint is str:
        return "a string"
    if hint is bool:
        return "True or False"
    if typing.get_origin(hint) is Callable:
        return "a function"
    if typing.get_origin(hint) in (Sequence, Iterable):
        return f"a list of {' or '.join(_name(of) for of in typing.get_args(hint))}"
    name = _name(hint)
    return f"{'an' if name[0] in 'AEIOUN' and name != 'None' else 'a'} {name}"


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_name(option) for option in typing.get_args(hint))
    known = {float: "numbers", str: "strings", type(None): "None", Module: "torch.nn.Module"}
    return known[hint] if hint in known else str(getattr(hint, "__name__", hint))
