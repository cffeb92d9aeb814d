"""`python -m tools.gpu.step NAME ...`: one step, in this process."""

from __future__ import annotations

import importlib
import sys

from tools.gpu.context import Context
from tools.gpu.plan import steps


def main() -> None:
    (step,) = steps("all", [sys.argv[1]])
    module, _, function = step.function.partition(":")
    context = Context.parse(step.name, sys.argv[2:])
    getattr(importlib.import_module(f"tools.gpu.steps.{module}"), function)(context)


if __name__ == "__main__":
    main()
