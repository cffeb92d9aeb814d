"""This package, one provider for each backend: no fallback from one to another."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import lora_kernels.functional as lkf
from bench.data import CaseData
from bench.providers.base import Outputs, Prepared, Provider, linear_call, loss_call
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
    case, a, b, bias = data.case, data.a, data.b, data.bias
    weights = data.dense_copies

    def forward(i: int, x: Tensor) -> Tensor:
        return lkf.lora_linear(
            x, weights[i], a, b, scale=case.scale, bias=bias, dropout_p=case.dropout
        )

    return linear_call(
        data,
        forward,
        len(weights),
        lambda i: (a, b),
        parameters=[*weights, a, b],
        mask=lambda: _mask(data),
    )


def _nf4_lora_linear(data: CaseData) -> Prepared:
    case, a, b, bias = data.case, data.a, data.b, data.bias
    weights = data.quantised_copies()

    def forward(i: int, x: Tensor) -> Tensor:
        return lkf.nf4_lora_linear(
            x, weights[i], a, b, scale=case.scale, bias=bias, dropout_p=case.dropout
        )

    return linear_call(
        data,
        forward,
        len(weights),
        lambda i: (a, b),
        parameters=[*(t for w in weights for t in w.tensors().values()), a, b],
        mask=lambda: _mask(data),
    )


def _linear_cross_entropy(data: CaseData) -> Prepared:
    return loss_call(data, lkf.linear_cross_entropy)


def _mask(data: CaseData) -> Tensor:
    p = data.case.dropout
    keep = lkf.dropout_mask((data.case.m, data.case.k), p, draw_seed(data.device))
    return keep.to(torch.float64) / (1 - round(65536 * p) / 65536)


_BUILDERS = {
    "nf4_quantize": _quantize,
    "nf4_dequantize": _dequantize,
    "nf4_linear": _nf4_linear,
    "lora_linear": _lora_linear,
    "nf4_lora_linear": _nf4_lora_linear,
    "linear_cross_entropy": _linear_cross_entropy,
}
