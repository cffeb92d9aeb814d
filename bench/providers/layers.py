"""This package's layers, as a model calls them: what a user waits for, Python included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.data import CaseData, Projection
from bench.providers.base import Prepared, Provider, linear_call
from bench.providers.ours import masks_of
from bench.providers.peers import frozen, linear_layer
from lora_kernels.nn import LoRAGateUp, LoRALinear, LoRAQKV, QLoRALinear

OPS = ("lora_linear", "nf4_lora_linear", "lora_packed", "nf4_lora_packed")


def provider() -> Provider:
    """On the backend that a user gets."""
    return Provider("ours:layer", OPS, _build, ours=True, suites="models")


def _build(data: CaseData) -> Prepared:
    case = data.case
    options: dict[str, Any] = {
        "r": case.r,
        "alpha": case.scale * case.r,
        "dropout": case.dropout,
        "adapter_dtype": data.adapter_dtype,
    }

    def layer(weight: Any, of: Projection) -> LoRALinear:
        if case.is_quantised:
            bias = None if of.bias is None else frozen(of.bias)
            made: Any = QLoRALinear.from_weight(weight, bias, **options)
        else:
            made = LoRALinear.from_linear(linear_layer(weight, of.bias), **options)
        for name, values in (("lora_A", of.a), ("lora_B", of.b)):
            setattr(made, name, nn.Parameter(values.detach(), requires_grad=case.backward))
        return made.train(case.backward)

    weights: Any = data.quantised_layer_copies() if case.is_quantised else data.layer_copies
    copies = [list(map(layer, copy, data.projections)) for copy in weights]
    together: Any = {1: lambda one: one, 2: LoRAGateUp, 3: LoRAQKV}[len(data.projections)]
    modules = [together(*of) for of in copies]

    def trained(i: int) -> dict[str, Tensor]:
        tensors = [t for made in copies[i] for t in (made.lora_A, made.lora_B)]
        return dict(zip(data.trained, tensors, strict=True))

    return linear_call(
        data,
        lambda i, x: modules[i](x),
        len(modules),
        trained,
        parameters=[t for made in copies[0] for t in (*made.parameters(), *made.buffers())],
        masks=lambda: masks_of(data),
    )
