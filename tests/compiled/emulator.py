"""Executors that run the package's Triton launches without a GPU.

`Emulator` compiles each launch for a compute capability and executes the PTX on the CPU, on the
very tensors of the call; what the op's host code does between the launches runs as it is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import Executor, Launch

TOOLS = Path(__file__).resolve().parents[3] / "shared" / "tools"


def load_emulator() -> Any:
    """The PTX emulator's module, or None where it is not installed beside the package."""
    if not (TOOLS / "ptxemu" / "__init__.py").exists():
        return None
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    import ptxemu

    return ptxemu


@dataclass
class Emulated:
    """A launch that was executed, and its profile."""

    launch: Launch
    profile: Any


@dataclass
class Emulator(Executor):
    """Executes the PTX of every launch for compute capability `cc`, with all checks on."""

    cc: int = 80
    device: Device | None = None
    options: dict[str, Any] = field(default_factory=dict)
    runs: list[Emulated] = field(default_factory=list)
    products: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    on_cpu: bool = True

    def run(self, launch: Launch) -> None:
        emulator = load_emulator()
        constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
        profile = emulator.run_triton(
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

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        self.products.append((left, right))
        return left @ right
