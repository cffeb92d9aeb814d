"""PyTorch alone: the frozen linear, the plain expression, addmm's order, and torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, linear

from bench.cases import Case
from bench.data import CaseData
from bench.providers.base import BASE, FULL, Prepared, linear_call, loss_call


def frozen_linear(data: CaseData) -> Prepared:
    """y = x·Wᵀ on the dense weight, and dx: what the layer costs before anything is added to it."""
    weights, bias = data.dense_copies, data.bias
    return linear_call(
        data,
        lambda i, x: linear(x, weights[i], bias),
        len(weights),
        computes=BASE if data.case.has_adapter else FULL,
        parameters=weights,
    )


def plain_lora(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float
) -> Tensor:
    """The expression as the paper writes it; fp32 adapters take x in fp32, as in PEFT."""
    y = linear(x, w, bias)
    branch = linear(linear(dropout(x.to(a.dtype), p), a), b)
    return (y + scale * branch).to(x.dtype)


def _plain_call(data: CaseData, expression: Any, **prepared: Any) -> Prepared:
    case, a, b, bias = data.case, data.a, data.b, data.bias
    weights = data.dense_copies
    return linear_call(
        data,
        lambda i, x: expression(x, weights[i], a, b, bias, case.scale, case.dropout),
        len(weights),
        lambda i: (a, b),
        parameters=[*weights, a, b],
        **prepared,
    )


def torch_mask(data: CaseData, dtype: torch.dtype) -> Tensor:
    """The multiplier of torch's dropout on an [M, K] tensor of this dtype, from the same seed."""
    ones = torch.ones(data.case.m, data.case.k, dtype=dtype, device=data.device)
    p = data.case.dropout
    return (dropout(ones, p) != 0).to(torch.float64) / (1 - p)


def loss_of_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """As transformers writes it: logits in x's dtype, the loss in fp32."""
    logits = linear(x, w)
    return cross_entropy(logits if x.dtype == torch.float64 else logits.float(), labels)


def eager(data: CaseData) -> Prepared:
    if data.case.op == "linear_cross_entropy":
        return loss_call(data, loss_of_logits)
    return _plain_call(data, plain_lora, mask=lambda: torch_mask(data, data.adapter_dtype))


def compiled(data: CaseData) -> Prepared:
    torch._dynamo.reset()
    if data.case.op == "linear_cross_entropy":
        return loss_call(data, torch.compile(loss_of_logits, fullgraph=True, dynamic=False))
    # inductor's dropout draws its own numbers: no mask to compare with.
    return _plain_call(data, torch.compile(plain_lora, fullgraph=True, dynamic=False))


class AddmmLoRA(torch.autograd.Function):
    """s·Bᵀ accumulated into the base result in place, backward written out by hand (p = 0).

    The order that Unsloth and Axolotl use: y = x·Wᵀ, y += scale·(x·Aᵀ)·Bᵀ; s is not kept but
    made again in the backward, adapters are cast to x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = linear(x, w, bias)
        return y.addmm_(x @ a.T, b.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b = ctx.saved_tensors
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        ds = dy @ b16
        da = (ds.T @ x).mul_(ctx.scale)
        db = (dy.T @ (x @ a16.T)).mul_(ctx.scale)
        dx = dy @ w
        dx.addmm_(ds, a16, alpha=ctx.scale)
        return dx, None, da.to(a.dtype), db.to(b.dtype), None, None


def addmm(data: CaseData) -> Prepared:
    def expression(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float
    ) -> Tensor:
        return AddmmLoRA.apply(x, w, a, b, bias, scale)

    return _plain_call(data, expression)


def addmm_refuses(case: Case, device: torch.device) -> str | None:
    return "has no dropout" if case.dropout else None
