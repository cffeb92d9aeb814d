"""Schemas, checks and fakes of the cross-entropy ops. x is 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.flops import product
from lora_kernels.ops.common.rank import rank_dtype


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


@define("cross_entropy", "(Tensor losses, Tensor dlogits)", flops=None)
class CrossEntropy(NamedTuple):
    """losses = log Σ exp(logits) - logits[label], and their gradient where asked."""

    logits: Tensor
    labels: Tensor
    ignore_index: int
    need_grad: bool

    def fake(self) -> tuple[Tensor, Tensor]:
        z = self.logits
        losses = z.new_empty(z.shape[0], dtype=loss_dtype(z.dtype))
        return losses, z.new_empty(z.shape if self.need_grad else (0,))


def _linear_flops(call: Any) -> int:
    return (1 + sum(call.needs)) * product(call.x[0], *call.weight)


@define("linear_cross_entropy", "(Tensor losses, Tensor dx, Tensor dw)", flops=_linear_flops)
class LinearCrossEntropy(NamedTuple):
    """The same of logits = x·Wᵀ; `needs` says which of dx and dW, by 0 or 1 (torch.jit.trace
    takes no list of flags). dw is a sum over rows, to be
    divided by their number: of an fp16 weight it is fp32."""

    x: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int
    needs: Sequence[int]

    def fake(self) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, needs = self.x, self.weight, self.needs
        return (
            x.new_empty(x.shape[0], dtype=loss_dtype(x.dtype)),
            x.new_empty(tuple(x.shape) if needs[0] else (0,)),
            weight.new_empty(
                tuple(weight.shape) if needs[1] else (0,), dtype=rank_dtype(weight.dtype)
            ),
        )
