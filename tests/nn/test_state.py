"""Copies, casts, the meta device and state dicts of LoRALinear and QLoRALinear."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.nn import QLoRALinear
from lora_kernels.testing import assert_call_within_budget
from tests.nn.layers import KINDS, K, N, R, dense_weight, make, plain, plain_args

kinds = pytest.mark.parametrize("kind", KINDS)


def _copies(layer):
    yield "deepcopy", copy.deepcopy(layer)
    yield "pickle", pickle.loads(pickle.dumps(layer))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield "torch.save", torch.load(buffer, weights_only=False)


@kinds
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_equal_and_apart(kind, merged):
    layer = make(kind).eval()
    x = torch.randn(3, K)
    if merged:
        layer.merge()
    y = layer(x)
    for name, other in _copies(layer):
        assert torch.equal(other(x), y), name
        assert other.merged == merged
        with torch.no_grad():
            other.lora_B.zero_()
        assert layer.lora_B.any(), name
        if merged:
            other.unmerge()
    if merged:
        layer.unmerge()
        assert not layer.merged


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype(kind, dtype):
    layer = make(kind).to(dtype)
    assert layer.lora_A.dtype == layer.bias.dtype == dtype
    x = torch.randn(3, K, dtype=dtype)
    assert_call_within_budget(lambda x, *_: layer(x), plain, plain_args(layer, x))


@kinds
def test_half_while_merged(kind):
    layer = make(kind).eval()
    expected = copy.deepcopy(layer).half()
    layer.merge()
    layer.half()
    x = torch.randn(3, K).half()
    args = plain_args(expected, x)
    assert_call_within_budget(lambda x, *_: layer(x), plain, args)
    layer.unmerge()
    assert torch.equal(layer(x), expected(x))


@kinds
def test_meta_device(kind):
    layer = KINDS[kind](K, N, r=R, device="meta")
    assert layer.lora_A.is_meta and layer.bias.is_meta
    assert set(layer.state_dict()) == set(make(kind).state_dict())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(64, K)
    assert_call_within_budget(lambda x, *_: layer(x), plain, plain_args(layer, x))
    assert not layer.lora_B.any() and layer.lora_A.any()
    assert dense_weight(layer, torch.float32).abs().max() <= 1 / math.sqrt(K) + 1e-6


@kinds
def test_a_plain_checkpoint_loads_strictly(kind):
    layer = make(kind)
    a, b = layer.lora_A.clone(), layer.lora_B.clone()
    linear = nn.Linear(K, N)
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.lora_A, a) and torch.equal(layer.lora_B, b)
    assert torch.equal(layer.bias, linear.bias)
    if kind == "lora":
        assert torch.equal(layer.weight, linear.weight)
    else:
        expected = QLoRALinear.from_linear(linear).weight
        assert torch.equal(layer.packed, expected.packed)


@kinds
@pytest.mark.parametrize("absent", ["lora_A", "lora_B", "weight", "bias"])
def test_a_missing_key_is_reported(kind, absent):
    layer = make(kind)
    state = layer.state_dict()
    del state[absent]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{absent}"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False) is not None


@kinds
def test_an_unexpected_key_is_reported(kind):
    layer = make(kind)
    state = layer.state_dict()
    state["weight.surprise"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight.surprise"'):
        layer.load_state_dict(state)


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, assign):
    layer, other = make(kind), make(kind)
    x = torch.randn(3, K)
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(other(x), layer(x))
    assert other.lora_A.requires_grad and not other.bias.requires_grad
    with torch.no_grad():
        layer.lora_B.zero_()
    assert other.lora_B.any() != assign


@kinds
def test_loading_a_merged_layer_merges_anew(kind):
    layer, other = make(kind).eval(), make(kind).eval()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, K)
    assert layer.merged
    with torch.no_grad():
        y = other(x)
        args = plain_args(other, x)
        assert_call_within_budget(lambda *_: layer(x), plain, args)
        layer.unmerge()
        assert torch.equal(layer(x), y)
