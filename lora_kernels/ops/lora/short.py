"""The short way of a layer's usual call on the CPU: from its arguments to the compiled kernel.

A token of a small layer takes the kernel a few microseconds. The way through the checks, the
choice of a backend and torch's dispatcher takes several times that, and a step of training ten
times. So the compiled ops look at the usual call themselves and answer None to any other, which
then takes the way of every call. Both ways run the same kernels and give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from lora_kernels.dispatch.registry import define_native, run, unobserved
from lora_kernels.ops.common.flatten import from_rows, to_rows
from lora_kernels.ops.common.native import refuse_device
from lora_kernels.ops.lora.schema import LoRALinearBackward

_PLAIN = (Tensor, Parameter)
_CALL = "(Tensor x, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, Tensor? bias"

define_native("linear_infer", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor?")
define_native("lora_linear_infer", _CALL + ") -> Tensor?")
define_native(
    "lora_dense_infer",
    "(Tensor x, Tensor weight, Tensor a, Tensor b, float scale, Tensor? bias) -> Tensor?",
)
define_native(
    "lora_linear_train",
    _CALL + ", float dropout_p, Tensor? seed, Tensor? rank_diag)"
    " -> (Tensor? y, Tensor? s, Tensor? drawn_seed)",
)
define_native(
    "lora_linear_train_bwd",
    "(Tensor dy, Tensor x, Tensor s, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale,"
    " float dropout_p, Tensor? seed, Tensor? rank_diag, bool[] needs)"
    " -> (Tensor? dx, Tensor? da, Tensor? db, Tensor? dbias, Tensor? drank_diag)",
)


class _Ops(NamedTuple):
    linear_infer: Callable[..., Any]
    lora_linear_infer: Callable[..., Any]
    lora_dense_infer: Callable[..., Any]
    lora_linear_train: Callable[..., Any]
    lora_linear_train_bwd: Callable[..., Any]


@functools.cache
def _ops() -> _Ops | None:
    """The ops, as torch calls them once it has found the overload; None without the extension."""
    if refuse_device("lora_linear_infer", torch.device("cpu")) is not None:
        return None
    native = torch.ops.lora_kernels_native
    return _Ops(*(getattr(native, name).default._op for name in _Ops._fields))


def _plain(t: Tensor) -> bool:
    return type(t) in _PLAIN and t.is_cpu


def short(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
) -> Tensor | None:
    """y [..., N] of `lora_linear` without an output diagonal; None where the call is not one of
    plain CPU tensors that no mode of torch's or ours looks at, or the weight is trained."""
    weight = base[0]
    if (
        not unobserved(x)
        or torch.is_autocast_enabled("cpu")
        or not (_plain(a) and _plain(b) and _plain(weight))
        or not (bias is None or _plain(bias))
        or type(scale) is not float
    ):
        return None
    ops = _ops()
    if ops is None:
        return None
    trained = torch.is_grad_enabled() and (
        a.requires_grad
        or b.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (rank_diag is not None and rank_diag.requires_grad)
    )
    drops = dropout_p != 0.0
    if not (drops or trained) and rank_diag is None and seed is None:
        if len(base) == 1:
            return ops.lora_dense_infer(x, weight, a, b, scale, bias)
        return ops.lora_linear_infer(x, base, meta, a, b, scale, bias)
    if (
        # Some are dropped, and some are kept.
        (drops and not (type(dropout_p) is float and 1e-4 < dropout_p < 0.999))
        or not (rank_diag is None or _plain(rank_diag))
        or not (seed is None or _plain(seed))
        or (trained and (weight.requires_grad or torch._C._are_functorch_transforms_active()))
    ):
        return None
    y, s, drawn = ops.lora_linear_train(
        x, base, meta, a, b, scale, bias, dropout_p, seed, rank_diag
    )
    if y is None or not trained:
        return y
    seed = None if not drops else seed if drawn is None else drawn
    made = (y, s, base, meta, scale, dropout_p, seed)
    return _apply(x, a, b, bias, rank_diag, made)


class ShortLoRALinearFunction(torch.autograd.Function):
    """`LoRALinearFunction` of a call that was short. What is saved is the same, in the same order,
    so that a checkpoint may run one where it had run the other."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        rank_diag: Tensor | None,
        made: tuple[Any, ...],
    ) -> Tensor:
        y, s, base, meta, scale, dropout_p, seed = made
        ctx.save_for_backward(s, to_rows(x), *base, a, b, seed, rank_diag)
        ctx.rest = (meta, scale, dropout_p)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # once_differentiable alone takes longer than a small layer's kernels.
        return _checked_gradients(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


# Function.apply looks for functorch's transforms first, which `short` has done.
_apply = super(torch.autograd.Function, ShortLoRALinearFunction).apply


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    s, x, *base, a, b, seed, rank_diag = ctx.saved_tensors
    meta, scale, dropout_p = ctx.rest
    needs = ctx.needs_input_grad[:5]
    call = (x, s, base, meta, a, b, scale, dropout_p, seed, rank_diag)
    ops = _ops()
    if unobserved(dy) and ops is not None and not torch._C._are_functorch_transforms_active():
        grads = ops.lora_linear_train_bwd(dy, *call, needs)
        for grad in grads:
            if grad is not None:
                return (*grads, None)
    made = run(
        "lora_linear_bwd", LoRALinearBackward(to_rows(dy), *call, None, [*needs, False, False])
    )
    dx, da, db, dbias, drank, *_ = (
        grad if need else None for grad, need in zip(made, [*needs, False, False], strict=True)
    )
    return (None if dx is None else from_rows(dx, dy), da, db, dbias, drank, None)


_checked_gradients = once_differentiable(_gradients)


def infer_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """y [..., N] of a plain linear layer, where the kernels are faster than torch's: a few rows of
    bf16. None elsewhere, and for what `short` answers None to, or a gradient is asked for."""
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
    ops = _ops()
    return None if ops is None else ops.linear_infer(x, weight, bias)
