"""Layers with adapters that do something, and the plain PyTorch expression they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_kernels.nn import LoRALinear, QLoRALinear

KINDS = {"lora": LoRALinear, "qlora": QLoRALinear}
K, N, R = 96, 48, 4


def make(
    kind: str, dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any
) -> LoRALinear | QLoRALinear:
    """A layer [48, 96] of rank 4 whose B is not zero."""
    layer = KINDS[kind].from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), r=R, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def dense_weight(layer: LoRALinear | QLoRALinear, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, LoRALinear):
        return layer.weight.detach().to(dtype)
    return layer.weight.dequantize(dtype)


def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    branch = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, w, bias) + scale * branch


def plain_args(layer: LoRALinear | QLoRALinear, x: Tensor) -> tuple[Any, ...]:
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    w = dense_weight(layer, x.dtype)
    return x, w, layer.lora_A.detach(), layer.lora_B.detach(), bias, layer.scale


def assert_checkpointing_repeats(layer: nn.Module, reentrant: bool) -> None:
    """Activation checkpointing draws the same dropout mask again: the same y and gradients."""
    results = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x = torch.ones(5, K, requires_grad=True)
        layer.zero_grad()
        torch.manual_seed(7)
        y = run(x)
        y.square().sum().backward()
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y.detach(), x.grad, *trained])
    assert len(results[0]) > 2
    for plain_result, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain_result, checkpointed)
