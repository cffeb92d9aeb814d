"""An executor that keeps the launches of a call and runs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import Executor, Launch, use_executor
from tools.gpu_proofs import ways


@dataclass
class Recorder(Executor):
    """Keeps launches; outputs stay as they were allocated."""

    device: Device | None = None
    launches: list[Launch] = field(default_factory=list)
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    on_cpu: bool = True

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)

    def product(
        self, left: Tensor, right: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        self.products.append((left, right))
        return left.new_empty(left.shape[0], right.shape[1]) if out is None else out


@contextmanager
def unfilled() -> Iterator[None]:
    """Fresh memory stays as it is, even where torch was asked to fill it, as tests ask it: what
    nobody writes takes no room, and a call at a real size has gigabytes."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def record(device: Device, call: Callable[[], Any], strategy: str | None = None) -> list[Launch]:
    """The launches that a call of the Triton backend makes on a device."""
    recorder = Recorder(device)
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.enter_context(ways.use(strategy))
        stack.enter_context(use_executor(recorder))
        call()
    return recorder.launches
