"""An executor that keeps the launches of a call and runs none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
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


def record(device: Device, call: Callable[[], Any], strategy: str | None = None) -> list[Launch]:
    """The launches that a call of the Triton backend makes on a device."""
    recorder = Recorder(device)
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.enter_context(ways.use(strategy))
        stack.enter_context(use_executor(recorder))
        call()
    return recorder.launches


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values whose products over the last dimension are near 1."""
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)


def lora_forward(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    dropout: float = 0.0,
    adapter: torch.dtype | None = None,
    fill: Callable[..., Tensor] = torch.empty,
) -> list[Any]:
    """Arguments of `lora_linear_fwd` for M, N, K, r; `fill` makes a tensor of a shape."""
    m, n, k, r = shape
    seed = torch.tensor([2024]) if dropout else None
    x, w = fill(m, k, dtype=dtype), fill(n, k, dtype=dtype)
    a, b = fill(r, k, dtype=adapter or dtype), fill(n, r, dtype=adapter or dtype)
    return [x, [w], [n, k], a, b, 1.5, None, dropout, seed, None, None]


def lora_backward(forward: list[Any], s: Tensor, dy: Tensor) -> list[Any]:
    """Arguments of `lora_linear_bwd` for dx, dA and dB after a forward of these."""
    x, base, meta, a, b, scale, bias, p, seed, rank_diag, out_diag = forward
    needs = [True, True, True, bias is not None, False, False, False]
    return [dy, x, s, base, meta, a, b, scale, p, seed, rank_diag, out_diag, needs]
