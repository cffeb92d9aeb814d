"""Between the public functions, which take any leading dimensions, and the ops, which take rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K] whose rows are contiguous, a view where the strides allow it."""
    if x.dim() != 2:
        x = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def from_rows(y: Tensor, x: Tensor) -> Tensor:
    """[M, N] -> [..., N] with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether the call has to go through autograd, which takes longer than a small layer's kernels.
    While `torch.jit.trace` runs it always has to: the traced function may later get tensors that
    require a gradient.
    """
    if torch.is_grad_enabled():
        if torch._C._get_tracing_state() is not None:
            return True
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on for the first tensor's device."""
    first = tensors[0]
    assert first is not None
    kind = "cpu" if first.is_cpu else first.device.type  # the latter makes two objects
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch raises for meta
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
