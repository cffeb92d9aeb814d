"""The forward of a layer that is not trained, the shortest way to the compiled kernel.

A token of a small layer takes the kernel a few microseconds. The way through the checks, the
choice of a backend and torch's dispatcher takes more than twice that. So the compiled op looks at
the usual call itself and answers None to any other, which then takes the way of every call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_kernels.dispatch.registry import define_native, unobserved
from lora_kernels.ops.common.native import refuse_device

_OP = "lora_linear_infer"
_PLAIN = (Tensor, Parameter)

_PLAIN_OP = "linear_infer"

define_native(
    _OP,
    "(Tensor x, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, Tensor? bias)"
    " -> Tensor?",
)
define_native(_PLAIN_OP, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor?")


@functools.cache
def _native(name: str) -> Any:
    """An op, or None without the extension."""
    if refuse_device(name, torch.device("cpu")) is not None:
        return None
    return getattr(torch.ops.lora_kernels_native, name).default


def _plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.is_cpu


def infer(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor | None:
    """y [..., N] of `lora_linear` without dropout or diagonals; None where the call is not one of
    plain CPU tensors outside autograd, that no mode of torch's or ours looks at."""
    if (
        not unobserved(x)
        or torch.is_autocast_enabled("cpu")
        or not (_plain(a) and _plain(b) and _plain(base[0]))
        or not (bias is None or _plain(bias))
        or type(scale) is not float
    ):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or a.requires_grad
        or b.requires_grad
        or base[0].requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return None
    op = _native(_OP)
    return None if op is None else op(x, base, meta, a, b, scale, bias)


def infer_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """y [..., N] of a plain linear layer, where the kernels are faster than torch's: a few rows of
    bf16. None elsewhere, and where `infer` answers None."""
    if (
        x.dtype is not torch.bfloat16
        or not unobserved(x)
        or torch.is_autocast_enabled("cpu")
        or not _plain(weight)
        or not (bias is None or _plain(bias))
    ):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return None
    op = _native(_PLAIN_OP)
    return None if op is None else op(x, weight, bias)
