"""Layers and models of PEFT for the tests of `accelerate`, and their results in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels.integrations.peft import accelerate, decelerate
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama

K, N = 64, 96
BASES = ("Linear", "Linear4bit", "Conv1D")


class Net(nn.Module):
    """One layer, whose name PEFT is told."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def base_layer(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    """A layer of K x N with fixed values."""
    torch.manual_seed(0)
    if kind == "Conv1D":
        layer: nn.Module = Conv1D(N, K)
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
        nn.init.normal_(layer.bias)  # type: ignore[arg-type]
        return layer.to(dtype)
    layer = nn.Linear(K, N, bias=bias).to(dtype)
    return four_bit(layer, dtype) if kind == "Linear4bit" else layer


def four_bit(linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """bitsandbytes' layer made of a plain one."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu")


def in_four_bit(model: Any, compute_dtype: torch.dtype | None = None) -> Any:
    """A model whose linear layers are bitsandbytes', but for the head and those of a width that
    bitsandbytes cannot run in eval mode on every CPU."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            fits = type(child) is nn.Linear and child.in_features % 64 == 0
            if fits and name != "lm_head":
                setattr(module, name, four_bit(child, compute_dtype))
    model.is_loaded_in_4bit = True
    return model


def adapted(base: nn.Module, autocast_adapter_dtype: bool = True, **options: Any) -> Any:
    """A PEFT model of a Net over `base`, its adapter awake."""
    net = Net(base)
    if type(net.layer).__name__ == "Linear4bit":
        net.is_loaded_in_4bit = True  # type: ignore[assignment]
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["layer"]} | options
    config = LoraConfig(**options)
    return wake(get_peft_model(net, config, autocast_adapter_dtype=autocast_adapter_dtype))


def peft_llama(dtype: torch.dtype = torch.float32, base: Any = None, **options: Any) -> Any:
    """A tiny Llama with LoRA of PEFT on every linear layer, awake."""
    options = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"} | options
    torch.manual_seed(3)
    return wake(get_peft_model(llama(dtype) if base is None else base, LoraConfig(**options)))


def wake(model: Any, seed: int = 2) -> Any:
    """Give what is zero at first values, so that adapters count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                p.normal_(std=0.1, generator=generator)
    return model


def layers(model: nn.Module) -> list[Any]:
    """The LoRA layers of a PEFT model."""
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


def exact(model: Any) -> Any:
    """A copy on PEFT's code in fp64, 4-bit weights decoded."""
    from lora_kernels.integrations.bitsandbytes import is_linear4bit, weight_from_linear4bit

    made = copy.deepcopy(model)
    decelerate(made)
    for layer in layers(made):
        base = layer.get_base_layer()
        if is_linear4bit(base):
            plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            plain.weight = nn.Parameter(
                weight_from_linear4bit(base).dequantize(torch.float64), requires_grad=False
            )
            plain.bias = base.bias
            layer.base_layer, layer.__class__ = plain, lora.Linear
            layer.fan_in_fan_out, layer.is_target_conv_1d_layer = False, False
    return made.double()


def both(
    model: Any, call: Callable[[Any], dict[str, Tensor]], dtype: torch.dtype | None = None
) -> None:
    """Hold an accelerated model's results and gradients against PEFT's, within the budget.

    `call` takes a model and gives tensors by name; gradients of the first one's sum are compared
    for every parameter that PEFT gives one. `dtype`: of x, for which adapters are cast to it in the
    plain expression, as everywhere in this package; PEFT widens x to the adapters instead.
    """
    plain_model = copy.deepcopy(model)
    for layer in layers(plain_model) if dtype is not None else ():
        for factors in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            p = next(factors.parameters(), None)
            if p is not None and torch.finfo(p.dtype).eps < torch.finfo(dtype).eps:
                factors.to(dtype)
    results = []
    for made in (copy.deepcopy(model), plain_model, exact(model)):
        results.append(_run(made, call, len(results) == 0))
    got, plain, oracle = results
    assert got.keys() == plain.keys() == oracle.keys()
    for name, t in got.items():
        assert_within_budget(t, oracle[name].double(), plain[name].to(t.dtype), name)


def _run(
    model: Any, call: Callable[[Any], dict[str, Tensor]], accelerated: bool
) -> dict[str, Tensor]:
    if accelerated:
        accelerate(model)
    else:
        decelerate(model)
    torch.manual_seed(11)
    found = call(model)
    first = next(iter(found.values()))
    if first.requires_grad:
        weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(4))
        (first * weights.to(first.dtype)).sum().backward()
        found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in found.items()}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fixed values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def forward(x: Tensor) -> Callable[[Any], dict[str, Tensor]]:
    """A call for `both`: the model's output of x, and x's gradient."""

    def call(model: Any) -> dict[str, Tensor]:
        p = next(q for q in model.parameters() if q.is_floating_point())
        own = x.double() if p.dtype == torch.float64 else x
        return {"y": model(own)}

    return call
