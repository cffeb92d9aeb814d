"""Schemas, checks and fakes of the cross-entropy ops. x is 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.flops import Call
from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.flops import product


def check_linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Raise ValueError or TypeError that names the argument which does not fit."""
    check_dtype("x", x, FLOATS)
    if x.dim() == 0:
        raise ValueError("x: got shape [], expected [..., K]")
    check_shape("weight", weight, ["V", x.shape[-1]])
    if weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected a row or more")
    check_dtype("weight", weight, [x.dtype])
    check_device("weight", weight, x.device)
    check_shape("labels", labels, x.shape[:-1])
    check_dtype("labels", labels, [torch.int64])
    check_device("labels", labels, x.device)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """Losses are fp32, or fp64 where the logits are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cross_entropy_fake(
    logits: Tensor, labels: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0], dtype=loss_dtype(logits.dtype))
    return losses, logits.new_empty(logits.shape if need_grad else (0,))


def _linear_cross_entropy_fake(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, needs: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=loss_dtype(x.dtype)),
        x.new_empty(tuple(x.shape) if needs[0] else (0,)),
        weight.new_empty(tuple(weight.shape) if needs[1] else (0,)),
    )


def _linear_cross_entropy_flops(call: Call) -> int:
    return (1 + sum(call.needs)) * product(call.x[0], *call.weight)


define(
    "cross_entropy",
    "(Tensor logits, Tensor labels, int ignore_index, bool need_grad)"
    " -> (Tensor losses, Tensor dlogits)",
    _cross_entropy_fake,
    flops=None,
)
# `needs` of numbers, 0 or 1: torch.jit.trace takes no list of flags.
define(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor labels, int ignore_index, int[] needs)"
    " -> (Tensor losses, Tensor dx, Tensor dw)",
    _linear_cross_entropy_fake,
    flops=_linear_cross_entropy_flops,
)
