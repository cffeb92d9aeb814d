"""What the Triton launchers share: the mask's parameters, strides, and launching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import Launch, executor
from lora_kernels.ops.common.philox import keep_scale, threshold


class Dropout:
    """The mask's parameters as the kernels take them. Without dropout the mask is off."""

    def __init__(self, p: float, seed: Tensor | None, stream: int) -> None:
        self.threshold = 0 if seed is None else threshold(p)
        self.on = self.threshold > 0
        self.seed = seed if self.on else None
        self.keep_scale = keep_scale(p) if self.on else 1.0
        self.stream = stream


NO_DROPOUT = Dropout(0.0, None, 0)


def precision(dtype: torch.dtype) -> str:
    """The precision of fp32 products: that of torch's own products."""
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"


def takes_tma(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe the matrices: rows of whole 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) > 0
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and t.numel() > 0
        for t in tensors
    )


def descriptor(t: Tensor, box: list[int]) -> Any:
    """A tensor descriptor of a matrix that `takes_tma`, for boxes of [rows, columns]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, box)


def stride(t: Tensor | None, dim: int = 0) -> int:
    return 1 if t is None else t.stride(dim)


def run(
    kernel: object,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    *,
    whole_registers: bool = False,
    **args: object,
) -> None:
    """Launch a kernel, or nothing over an empty grid."""
    if all(grid):
        executor().run(Launch(kernel, grid, args, warps, stages, whole_registers))
