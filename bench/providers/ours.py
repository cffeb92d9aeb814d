"""This package, one provider for each backend: no fallback from one to another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import lora_kernels.functional as lkf
from bench.data import CaseData
from bench.providers.base import Outputs, Prepared, Provider, Result, linear_call, loss_call
from lora_kernels import NF4Weight, use_backend
from lora_kernels.ops.lora.api import draw_seed


def provider(backend: str, suites: str = "all") -> Provider:
    """The provider that runs every op on one backend."""
    build = functools.partial(_build, backend)
    return Provider(f"ours:{backend}", tuple(_BUILDERS), build, ours=True, suites=suites)


def _build(backend: str, data: CaseData) -> Prepared:
    prepared = _BUILDERS[data.case.op](data)
    prepared.context = lambda: use_backend(backend)
    return prepared


def _quantize(data: CaseData) -> Prepared:
    case = data.case
    sources = data.source_copies

    def call(i: int) -> Outputs:
        w = sources[i % len(sources)]
        q = NF4Weight.quantize(w, case.block_size, case.nested, case.quant_type)
        return q.tensors()

    return Prepared(call, len(sources))


def _dequantize(data: CaseData) -> Prepared:
    weights = data.quantised_copies()
    return Prepared(lambda i: {"w": weights[i % len(weights)].dequantize(data.dtype)}, len(weights))


def _nf4_linear(data: CaseData) -> Prepared:
    weights, bias = data.quantised_copies(), data.bias
    return linear_call(
        data,
        lambda i, x: lkf.nf4_linear(x, weights[i], bias=bias),
        len(weights),
        parameters=[t for w in weights for t in w.tensors().values()],
    )


def _lora_linear(data: CaseData) -> Prepared:
    weights = data.dense_copies
    return _with_adapter(data, lkf.lora_linear, weights, weights)


def _nf4_lora_linear(data: CaseData) -> Prepared:
    weights = data.quantised_copies()
    stored = [t for w in weights for t in w.tensors().values()]
    return _with_adapter(data, lkf.nf4_lora_linear, weights, stored)


def _with_adapter(
    data: CaseData, op: Callable[..., Tensor], weights: Sequence[Any], stored: Sequence[Tensor]
) -> Prepared:
    """An op over one projection; `stored` are the tensors of its weights."""
    case, a, b, bias = data.case, data.a, data.b, data.bias

    def forward(i: int, x: Tensor) -> Tensor:
        return op(x, weights[i], a, b, scale=case.scale, bias=bias, dropout_p=case.dropout)

    return linear_call(
        data,
        forward,
        len(weights),
        lambda i: data.trained,
        parameters=[*stored, a, b],
        masks=lambda: masks_of(data),
    )


def _of_several(data: CaseData, op: Callable[..., Result]) -> Prepared:
    """An op over several projections."""
    case, projections = data.case, data.projections
    quantised = data.quantised_layer_copies() if case.is_quantised else []
    weights: Sequence[Sequence[Any]] = quantised or data.layer_copies
    stored = [t for copy in quantised for q in copy for t in q.tensors().values()]
    arguments: dict[str, Any] = {
        "lora_a": [p.a for p in projections],
        "lora_b": [p.b for p in projections],
        "scales": [case.scale] * len(projections),
        "biases": [p.bias for p in projections],
        "dropout_p": case.dropout,
    }
    return linear_call(
        data,
        lambda i, x: op(x, weights[i], **arguments),
        len(weights),
        lambda i: data.trained,
        parameters=[
            *(stored if quantised else (w for copy in weights for w in copy)),
            *data.trained.values(),
        ],
        masks=lambda: masks_of(data),
    )


def _lora_packed(data: CaseData) -> Prepared:
    return _of_several(data, lkf.lora_packed_linear)


def _lora_mlp(data: CaseData) -> Prepared:
    return _of_several(data, lkf.lora_mlp)


def _glu(data: CaseData) -> Prepared:
    up = data.up
    return linear_call(
        data, lambda i, x: lkf.gated_activation(x, up[i]), len(up), lambda i: {"up": up[i]}
    )


def _dora_linear(data: CaseData) -> Prepared:
    """The norms of the frozen weight are known, as in a layer."""
    case, a, b, bias, magnitude = data.case, data.a, data.b, data.bias, data.magnitude
    weights, norm_sq = data.dense_copies, lkf.weight_norm_squared(data.weight)

    def forward(i: int, x: Tensor) -> Tensor:
        return lkf.dora_linear(
            *(x, weights[i], a, b, magnitude),
            scale=case.scale,
            bias=bias,
            dropout_p=case.dropout,
            weight_norm_sq=norm_sq,
        )

    return linear_call(
        data,
        forward,
        len(weights),
        lambda i: data.trained,
        parameters=[*weights, *data.trained.values()],
        masks=lambda: masks_of(data),
    )


def _gather_lora(data: CaseData) -> Prepared:
    weights, pools, bias, slots = data.dense_copies, data.page_copies, data.bias, data.slots
    return linear_call(
        data,
        lambda i, x: lkf.gather_lora(
            x, pools[i % len(pools)], slots, base=weights[i % len(weights)], bias=bias
        ),
        max(len(weights), len(pools)),
        lambda i: data.trained,
        parameters=[*weights, *(t for p in pools for t in (p.a, p.b))],
    )


def _gather_lora_add(data: CaseData) -> Prepared:
    pools, slots = data.page_copies, data.slots
    out = torch.empty(data.case.m, data.case.n, dtype=data.dtype, device=data.device)
    return linear_call(
        data,
        lambda i, x: lkf.gather_lora(x, pools[i], slots, out=out, add=False),
        len(pools),
    )


def _gather_lora_embed(data: CaseData) -> Prepared:
    weights, pools, slots = data.table_copies, data.page_copies, data.slots
    return linear_call(
        data,
        lambda i, ids: lkf.gather_lora_embedding(
            ids, pools[i % len(pools)], slots, weight=weights[i % len(weights)]
        ),
        max(len(weights), len(pools)),
        lambda i: data.trained,
        parameters=[*weights, *(t for p in pools for t in p)],
    )


def _linear_cross_entropy(data: CaseData) -> Prepared:
    return loss_call(data, lkf.linear_cross_entropy)


def masks_of(data: CaseData) -> list[Tensor]:
    """One stream of the same seed for each layer."""
    case, seed = data.case, draw_seed(data.device)
    p = case.dropout
    keep = (
        lkf.dropout_mask((case.m, layer.k), p, seed, stream)
        for stream, layer in enumerate(case.layers)
    )
    return [mask.to(torch.float64) / (1 - round(65536 * p) / 65536) for mask in keep]


_BUILDERS = {
    "nf4_quantize": _quantize,
    "nf4_dequantize": _dequantize,
    "nf4_linear": _nf4_linear,
    "lora_linear": _lora_linear,
    "nf4_lora_linear": _nf4_lora_linear,
    "lora_packed": _lora_packed,
    "nf4_lora_packed": _lora_packed,
    "lora_mlp": _lora_mlp,
    "glu": _glu,
    "dora_linear": _dora_linear,
    "gather_lora": _gather_lora,
    "gather_lora_add": _gather_lora_add,
    "gather_lora_embed": _gather_lora_embed,
    "linear_cross_entropy": _linear_cross_entropy,
}
