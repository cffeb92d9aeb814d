"""PyTorch alone: the frozen linear, the plain expression, addmm's order, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, dropout, embedding, linear, silu

from bench.cases import EMBED, Case
from bench.data import CaseData, Projection
from bench.providers.base import BASE, FULL, Prepared, Result, linear_call, loss_call

Lora = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]


def frozen_linear(data: CaseData) -> Prepared:
    """y = x·Wᵀ on the dense weight (or weights), and dx: what the layer costs before anything is
    added to it. Of an MLP its three linears and the gate between them."""
    case, weights = data.case, data.layer_copies
    expression = _expression(case.op, lambda x, w, a, b, bias, scale, p: linear(x, w, bias))
    return linear_call(
        data,
        lambda i, x: expression(x, weights[i], data.projections, case.scale, 0.0),
        len(weights),
        computes=BASE if case.has_adapter else FULL,
        parameters=[w for copy in weights for w in copy],
    )


def plain_lora(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, p: float
) -> Tensor:
    """The expression as the paper writes it; fp32 adapters take x in fp32, as in PEFT."""
    y = linear(x, w, bias)
    branch = linear(linear(dropout(x.to(a.dtype), p), a), b)
    return (y + scale * branch).to(x.dtype)


def plain_dora(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scale: float,
    p: float,
) -> Tensor:
    """m̂ ∘ (x·Wᵀ + scale·x·Aᵀ·Bᵀ) + bias with the merged weight's norms a constant, as the paper
    says; dropout as in PEFT. fp32 adapters take x in fp32."""
    with torch.no_grad():
        merged = w.to(torch.promote_types(w.dtype, torch.float32))
        norm = torch.linalg.vector_norm(merged + scale * (b @ a).to(merged.dtype), dim=1)
    m = (magnitude / norm).to(a.dtype)
    dropped = dropout(x.to(a.dtype), p)
    branch = scale * linear(linear(dropped, a), b)
    if p == 0:
        y = m * (linear(x, w) + branch)
    else:
        y = linear(x, w) + (m - 1) * linear(dropped.to(x.dtype), w) + m * branch
    return (y if bias is None else y + bias).to(x.dtype)


def plain_gather(
    x: Tensor, a: Tensor, b: Tensor, table: Tensor, ranks: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """scale · x·Aᵀ·B of each token's own adapter, its pages gathered to [M, r, K] and [M, r, N]."""
    used = slots.clamp(min=0).long()
    pages = table[used].long()  # [M, C]
    a, b = a[pages].flatten(1, 2).to(x.dtype), b[pages].flatten(1, 2).to(x.dtype)
    s = torch.bmm(a, x[:, :, None])[:, :, 0]  # [M, r]
    return _expand(s, b, ranks, slots, scale)


def _expand(s: Tensor, b: Tensor, ranks: Tensor, slots: Tensor, scale: float) -> Tensor:
    """scale · s·B of each token's b [M, r, N], without the ranks past its adapter's."""
    own = torch.where(slots >= 0, ranks[slots.clamp(min=0).long()], 0)
    ours = torch.arange(s.shape[1], device=s.device) < own[:, None]
    s = scale * torch.where(ours, s, torch.zeros_like(s))
    return torch.bmm(s[:, None], b)[:, 0]


def plain_gather_embed(
    ids: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    table: Tensor,
    ranks: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    """w[id] + scale · A[:, id]ᵀ·B of each token's own adapter, w [V, D], a [P, V, 16]."""
    pages = table[slots.clamp(min=0).long()].long()  # [M, C]
    s = a[pages, ids[:, None]].flatten(1).to(w.dtype)  # [M, r]
    return embedding(ids, w) + _expand(s, b[pages].flatten(1, 2).to(w.dtype), ranks, slots, scale)


def gather_embed(data: CaseData) -> Prepared:
    """The same of an embedding."""
    case, slots = data.case, data.slots
    weights, pools = data.table_copies, data.page_copies

    def forward(i: int, ids: Tensor) -> Tensor:
        p, w = pools[i % len(pools)], weights[i % len(weights)]
        return plain_gather_embed(ids, w, p.a, p.b, p.table, p.ranks, slots, case.scale)

    return linear_call(
        data,
        forward,
        max(len(weights), len(pools)),
        lambda i: data.trained,
        parameters=[*weights, *(t for p in pools for t in p)],
    )


def gather(data: CaseData) -> Prepared:
    """What one writes without a kernel: a gather of the weights and batched products."""
    case, slots, bias = data.case, data.slots, data.bias if data.case.has_weight else None
    weights, pools = data.dense_copies if case.has_weight else [], data.page_copies

    def forward(i: int, x: Tensor) -> Tensor:
        p = pools[i % len(pools)]
        z = plain_gather(x, p.a, p.b, p.table, p.ranks, slots, case.scale)
        return linear(x, weights[i % len(weights)], bias) + z if weights else z

    return linear_call(
        data,
        forward,
        max(len(weights), len(pools)),
        lambda i: data.trained,
        parameters=[*weights, *(t for p in pools for t in (p.a, p.b))],
    )


def plain_glu(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers writes it."""
    return silu(gate) * up


def _expression(op: str, lora: Lora) -> Callable[..., Result]:
    """The op in terms of its projections, each of them by `lora`."""

    def each(
        x: Tensor, weights: Sequence[Tensor], of: Sequence[Projection], scale: float, p: float
    ) -> tuple[Tensor, ...]:
        pairs = zip(weights, of, strict=True)
        return tuple(lora(x, w, q.a, q.b, q.bias, scale, p) for w, q in pairs)

    def one(x: Tensor, *rest: Any) -> Tensor:
        return each(x, *rest)[0]

    def mlp(
        x: Tensor, weights: Sequence[Tensor], of: Sequence[Projection], scale: float, p: float
    ) -> Tensor:
        gate, up = each(x, weights[:2], of[:2], scale, p)
        return one(plain_glu(gate, up), weights[2:], of[2:], scale, p)

    if op == "lora_mlp":
        return mlp
    return each if op in ("lora_packed", "nf4_lora_packed") else one


def _plain_call(
    data: CaseData, lora: Lora, wrap: Callable[[Any], Any] = lambda f: f, **prepared: Any
) -> Prepared:
    """The adapted layer, or layers, by `lora`; `wrap` may compile the whole expression."""
    case, weights = data.case, data.layer_copies
    expression = wrap(_expression(case.op, lora))
    return linear_call(
        data,
        lambda i, x: expression(x, weights[i], data.projections, case.scale, case.dropout),
        len(weights),
        lambda i: data.trained,
        parameters=[*(w for copy in weights for w in copy), *data.trained.values()],
        **prepared,
    )


def _dora_call(
    data: CaseData, wrap: Callable[[Any], Any] = lambda f: f, **prepared: Any
) -> Prepared:
    case, a, b, bias, magnitude = data.case, data.a, data.b, data.bias, data.magnitude
    weights, expression = data.dense_copies, wrap(plain_dora)
    return linear_call(
        data,
        lambda i, x: expression(x, weights[i], a, b, magnitude, bias, case.scale, case.dropout),
        len(weights),
        lambda i: data.trained,
        parameters=[*weights, *data.trained.values()],
        **prepared,
    )


def _glu_call(data: CaseData, wrap: Callable[[Any], Any] = lambda f: f) -> Prepared:
    up, expression = data.up, wrap(plain_glu)
    return linear_call(data, lambda i, x: expression(x, up[i]), len(up), lambda i: {"up": up[i]})


def torch_masks(data: CaseData, dtype: torch.dtype) -> list[Tensor]:
    """The multipliers of torch's dropout on the layers' inputs in this dtype, one layer after the
    other, from the same seed."""
    case, p = data.case, data.case.dropout

    def draw(k: int) -> Tensor:
        ones = torch.ones(case.m, k, dtype=dtype, device=data.device)
        return (dropout(ones, p) != 0).to(torch.float64) / (1 - p)

    return [draw(layer.k) for layer in case.layers]


def loss_of_logits(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """As transformers writes it: logits in x's dtype, the loss in fp32."""
    logits = linear(x, w)
    return cross_entropy(logits if x.dtype == torch.float64 else logits.float(), labels)


def eager(data: CaseData) -> Prepared:
    op = data.case.op
    if op == EMBED:
        return gather_embed(data)
    if data.case.is_gather:
        return gather(data)
    if op == "linear_cross_entropy":
        return loss_call(data, loss_of_logits)
    if op == "glu":
        return _glu_call(data)

    def masks() -> list[Tensor]:
        return torch_masks(data, data.adapter_dtype)

    if op == "dora_linear":
        return _dora_call(data, masks=masks)
    return _plain_call(data, plain_lora, masks=masks)


def compiled(data: CaseData) -> Prepared:
    torch._dynamo.reset()
    op = data.case.op

    def wrap(expression: Any) -> Any:
        return torch.compile(expression, fullgraph=True, dynamic=False)

    if op == "linear_cross_entropy":
        return loss_call(data, wrap(loss_of_logits))
    if op == "glu":
        return _glu_call(data, wrap)
    # inductor's dropout draws its own numbers: no masks to compare with.
    return _dora_call(data, wrap) if op == "dora_linear" else _plain_call(data, plain_lora, wrap)


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
