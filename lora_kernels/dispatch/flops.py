"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: the products of matrices that
plain PyTorch would need for the same result, decoding of a quantised weight left out.

A formula stands where its op is defined. It takes the op's arguments by name, shapes in place of
tensors, and never values: the count costs nothing and is the same on every device.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


class Call:
    """An op's arguments by the names in its schema, as attributes."""

    def __init__(self, schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            setattr(self, argument.name, value)

    def __getattr__(self, name: str) -> Any:  # of a name that the schema lacks
        raise AttributeError(f"call: has no argument {name!r}, expected one of {list(vars(self))}")


Formula = Callable[[Call], int]
_waiting: list[Callable[[], None]] = []


def register_flops(namespace: str, name: str, schema: str, formula: Formula | None) -> None:
    """Make FlopCounterMode count an op; None: it multiplies no matrices."""
    parsed = torch._C.parse_schema(f"{namespace}::{name}{schema}")

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 0 if formula is None else formula(Call(parsed, args, kwargs))

    def register() -> None:
        counter = importlib.import_module(COUNTER)
        counter.register_flop_formula(getattr(getattr(torch.ops, namespace), name))(count)

    if COUNTER in sys.modules:
        register()
    else:
        _waiting.append(register)


class _WhenImported(MetaPathFinder):
    """Registers the formulas once somebody imports torch's counter: that imports Triton, which
    takes half a second, and few want to count."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                for register in _waiting:
                    register()
                _waiting.clear()

            loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
