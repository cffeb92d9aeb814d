"""The schema string of an op, made from the class of its calls, where each argument stands once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

# An argument that the op writes to.
Mutated: TypeAlias = Annotated[Tensor, "(a!)"]

_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Mutated: "Tensor(a!)",
    Sequence[Tensor]: "Tensor[]",
    Sequence[Tensor | None]: "Tensor?[]",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    Sequence[bool]: "bool[]",
    torch.dtype: "ScalarType",
    bool: "bool",
    float: "float",
    int: "int",
}


def schema_of(call: type, returns: str) -> str:
    """Arguments and returns, as `torch.library.define` takes them.

    Args:
        call: a NamedTuple whose fields are the op's arguments.
        returns: "Tensor y", or several in parentheses.

    Raises:
        TypeError: a field's type is none that a schema knows.
    """
    hints = typing.get_type_hints(call, include_extras=True)
    arguments = []
    for name, parameter in inspect.signature(call).parameters.items():
        if hints[name] not in _KINDS:
            raise TypeError(f"{call.__name__}.{name}: {hints[name]} has no place in a schema")
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        arguments.append(f"{_KINDS[hints[name]]} {name}{default}")
    return f"({', '.join(arguments)}) -> {returns}"
