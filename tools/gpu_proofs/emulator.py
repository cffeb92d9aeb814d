"""An executor that runs the compiled PTX of the package's Triton launches on the CPU."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import Executor, Launch
from tools.ptxemu import Result, run_triton

# What only finds faults and changes no count; off, it runs twice as fast.
UNCHECKED = {"race": False, "uninit": False, "poison_shared": False, "check_global": False}


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler {compiler} (set CXX) to build the PTX emulator"
    return None


@dataclass
class Emulated:
    """A launch that was executed, and its profile."""

    launch: Launch
    profile: Result

    @property
    def name(self) -> str:
        return self.launch.kernel.fn.__name__


@dataclass
class Emulator(Executor):
    """Compiles every launch for compute capability `cc` and executes it on the very tensors of the
    call; what the op's host code does between the launches runs as it is.

    Attributes:
        device: what the cost model plans for.
        options: of `ptxemu.launch`; all checks are on by default.
        runs, products: what was launched, and the operands of the vendor's GEMMs, in order.
    """

    cc: int = 80
    device: Device | None = None
    options: dict[str, Any] = field(default_factory=dict)
    runs: list[Emulated] = field(default_factory=list)
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    on_cpu: bool = True

    def run(self, launch: Launch) -> None:
        constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
        profile = run_triton(
            launch.kernel,
            None,
            {n: v for n, v in launch.args.items() if n in constexprs},
            {n: v for n, v in launch.args.items() if n not in constexprs},
            launch.grid,
            num_warps=launch.warps,
            num_stages=launch.stages,
            cc=self.cc,
            **self.options,
        )
        self.runs.append(Emulated(launch, profile))

    def product(
        self, left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        self.products.append((left, right))
        return super().product(left, right, bias, out)
