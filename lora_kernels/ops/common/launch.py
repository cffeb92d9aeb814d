"""How kernels are launched: through one executor, so that tests can run them elsewhere.

The usual executor is Triton's own JIT. The same host code is proven without a GPU by executors that
interpret the compiled PTX, compile ahead of time, or count bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch.op import Implementation
from lora_kernels.dispatch.registry import register
from lora_kernels.dispatch.settings import Setting
from lora_kernels.ops.common import triton_version
from lora_kernels.ops.common.checks import names
from lora_kernels.ops.common.configs import Device, device_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_TYPES = ("cuda",)  # also what torch calls AMD's
MOST_REGISTERS = 255  # of a thread


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the jitted function.
        grid: programs along x (and y).
        args: every argument by name: tensors, descriptors, numbers, and the constexprs.
        warps, stages: of the compiled kernel.
        whole_registers: whether a thread may take every register. Otherwise ptxas may put a few
            values on the stack, so that one more program fits the multiprocessor.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    warps: int
    stages: int
    whole_registers: bool = False

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments by name, and those that the compiler knows of every group."""
        found = {name: a for name, a in self.args.items() if not isinstance(a, tuple)}
        for group in self.args.values():
            found |= _constants(group)
        return found

    def options(self, *, nvidia: bool) -> dict[str, Any]:
        """What Triton is told beside the arguments; AMD's compiler knows no `maxnreg`."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        limited = self.whole_registers and nvidia
        return options | {"maxnreg": MOST_REGISTERS} if limited else options


def _constants(group: object) -> dict[str, Any]:
    """The members in capitals of a group of arguments, and of the groups in it."""
    if not isinstance(group, tuple):
        return {}
    found: dict[str, Any] = {}
    for name, a in zip(getattr(group, "_fields", ()), group, strict=False):
        if hasattr(a, "value") and name.isupper():  # a tl.constexpr
            found[name] = a.value
    for a in group:
        found |= _constants(a)
    return found


class Executor:
    """Runs launches, and the vendor's products between them.

    Attributes:
        on_cpu: whether CPU tensors are taken.
        device: what the cost model plans for; None is the tensors' own device.
    """

    on_cpu: bool = False
    device: Device | None = None

    def run(self, launch: Launch) -> None:
        options = launch.options(nvidia=torch.version.hip is None)
        launch.kernel[launch.grid](**launch.args, **options)

    def product(
        self, left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """left·right + bias by the vendor's GEMM, into `out` where given."""
        if bias is not None:
            return torch.addmm(bias, left, right, out=out)
        return torch.mm(left, right, out=out)


class _Interpreter(Executor):
    on_cpu = True


@cache
def interpreting() -> bool:
    """Whether Triton interprets its kernels in this process."""
    import triton

    return bool(triton.knobs.runtime.interpret)


_executor: Setting[Executor | None] = Setting("executor", None)


@contextmanager
def use_executor(executor: Executor | None) -> Iterator[None]:
    """Run this thread's launches through another executor until the block ends."""
    with _executor.use(executor):
        yield


def executor() -> Executor:
    """The executor in use."""
    return _executor.get() or _usual_executor()


@cache
def _usual_executor() -> Executor:
    return _Interpreter() if interpreting() else Executor()


def planned_device(device: torch.device) -> Device:
    """What the cost model plans for when tensors are on a torch device."""
    return executor().device or device_of(device)


def refuse_device(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None."""
    reason = triton_version.refuse()
    if reason is not None:
        return reason
    if device.type not in GPU_TYPES and not (device.type == "cpu" and executor().on_cpu):
        return f"takes CUDA and ROCm tensors, not {device.type} (but under TRITON_INTERPRET=1)"
    if isinstance(executor(), _Interpreter):
        return triton_version.refuse_interpreter()
    return None


def refuse_triton(tensors: Sequence[Tensor | None]) -> str | None:
    """Why the Triton kernels cannot take these tensors (x first), or None."""
    assert tensors[0] is not None
    reason = refuse_device(tensors[0].device)
    if reason is not None:
        return reason
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"takes {names(DTYPES)}, not {names([t.dtype])}"
    return None


def register_triton(op: str, module: str, supports: Callable[[Any], str | None]) -> None:
    """Register function `op` of a module as the op's Triton implementation; the module, and with it
    triton, is imported at the first call."""

    def launch(call: Any) -> Any:
        tensors = (t for a in call for t in (a if isinstance(a, list | tuple) else (a,)))
        device = next(t.device for t in tensors if isinstance(t, Tensor))
        function = getattr(importlib.import_module(module), op)
        if device.type == "cpu":
            return function(call)
        with torch.cuda.device(device):  # Triton launches on the current one
            return function(call)

    register(op, Implementation("triton", launch, supports))
