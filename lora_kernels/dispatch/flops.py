"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops: the products of matrices that
plain PyTorch would need for the same result, decoding of a quantised weight left out.

A formula stands where its op is defined. It takes a call of the op with shapes in place of tensors,
and never values: the count costs nothing and is the same on every device.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"


Formula = Callable[[Any], int]
_waiting: list[Callable[[], None]] = []


def register_flops(
    namespace: str, name: str, call: Callable[..., Any], formula: Formula | None
) -> None:
    """Make FlopCounterMode count an op. `call` makes the op's calls. A formula of None: the op
    multiplies no matrices."""

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 0 if formula is None else formula(call(*args, **kwargs))

    def register() -> None:
        counter = importlib.import_module(COUNTER)
        counter.register_flop_formula(getattr(getattr(torch.ops, namespace), name))(count)

    if COUNTER in sys.modules:
        register()
    else:
        _waiting.append(register)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when torch's counter is imported, not before: that imports Triton,
    which takes half a second, and few programs count FLOPs."""

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
