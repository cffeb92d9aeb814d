"""LoRALinear as a drop-in for nn.Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.nn import LoRALinear
from tests.nn.layers import K, N, R, make


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(bias):
    linear = nn.Linear(K, N, bias=bias)
    layer = LoRALinear.from_linear(linear, r=R)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (K, N)
    assert not layer.weight.requires_grad
    assert list(layer.state_dict())[: len(linear.state_dict())] == list(linear.state_dict())
    assert set(layer.state_dict()) - set(linear.state_dict()) == {"lora_A", "lora_B"}
    assert tuple(layer.lora_A.shape) == (R, K) and tuple(layer.lora_B.shape) == (N, R)


def test_its_own_constructor_draws_the_base_as_linear_does():
    torch.manual_seed(1)
    linear = nn.Linear(K, N)
    torch.manual_seed(1)
    layer = LoRALinear(K, N, r=R)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


def test_its_checkpoint_loads_into_a_plain_layer():
    layer, linear = make("lora"), nn.Linear(K, N)
    result = linear.load_state_dict(layer.state_dict(), strict=False)
    assert result.missing_keys == [] and result.unexpected_keys == ["lora_A", "lora_B"]
    assert torch.equal(linear.weight, layer.weight)


def test_a_plain_model_checkpoint_loads_strictly():
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    ours = nn.Sequential(LoRALinear(8, 8), nn.ReLU(), LoRALinear(8, 4))
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(3, 8)
    ours[0].adapter_enabled = ours[2].adapter_enabled = False
    assert torch.equal(ours(x), plain(x))


def test_the_wrong_rank_is_reported():
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        LoRALinear(K, N, r=8).load_state_dict(LoRALinear(K, N, r=4).state_dict())


def test_bad_weight_dtype_is_named():
    layer = make("lora", torch.bfloat16)
    with pytest.raises(TypeError, match="weight: got dtype bfloat16, expected float32"):
        layer(torch.randn(2, K))
