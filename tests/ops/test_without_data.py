"""The functions on tensors that have a shape and a device but no data: meta ones, fake ones."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lora_kernels import NF4Weight, functional
from lora_kernels.ops.nf4.double_quant import dynamic_map

M, N, K, R = 4, 192, 256, 8


def outputs(device: str) -> list[torch.Tensor]:
    x = torch.empty(M, K, dtype=torch.bfloat16, device=device)
    w = torch.empty(N, K, dtype=torch.bfloat16, device=device)
    a, b = torch.empty(R, K, device=device), torch.empty(N, R, device=device)
    quantised = NF4Weight.quantize(w)
    assert quantised.quant_map.shape == (16,)
    return [
        functional.nf4_linear(x, quantised),
        functional.lora_linear(x, w, a, b, scale=2.0),
        functional.nf4_lora_linear(x, quantised, a, b, scale=2.0),
    ]


def check(device: str) -> None:
    for y in outputs(device):
        assert (y.device.type, y.shape, y.dtype) == (device, (M, N), torch.bfloat16)


def test_meta() -> None:
    check("meta")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake(device: str) -> None:
    with FakeTensorMode():
        check(device)
    # Nothing that has no data stays behind for calls with data.
    assert torch.isfinite(dynamic_map()).all()
    assert torch.isfinite(NF4Weight.quantize(torch.ones(N, K)).quant_map).all()
