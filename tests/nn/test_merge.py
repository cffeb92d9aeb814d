"""merge, unmerge, to_linear: to the bit, and whatever happens in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.testing import assert_call_within_budget, assert_within_budget
from tests.nn.layers import KINDS, K, N, R, dense_weight, make, plain, plain_args

kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def _bits(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


@kinds
@dtypes
def test_unmerge_is_exact(kind, dtype):
    layer = make(kind, dtype).eval()
    x = torch.randn(5, K, dtype=dtype)
    before, y = _bits(layer), layer(x)
    for _ in range(3):
        layer.merge()
        assert layer.merged
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), y)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@kinds
@dtypes
def test_the_merged_weight_is_rounded_once(kind, dtype):
    layer = make(kind, dtype)
    layer.merge()
    w = dense_weight(layer, torch.float32)
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    expected = (w + (b @ a) * layer.scale).to(dtype)
    assert torch.equal(layer._merged_weight, expected)


@kinds
@dtypes
def test_a_merged_layer_computes_the_same(kind, dtype):
    layer = make(kind, dtype).eval()
    x = torch.randn(5, K, dtype=dtype)
    exact = plain(*(t.double() if isinstance(t, torch.Tensor) else t for t in plain_args(layer, x)))
    layer.merge()
    merged = layer._merged_weight
    with torch.no_grad():
        y = layer(x)
        # Merging rounds the weight once more than the plain expression does.
        expected = nn.functional.linear(x, merged, layer.bias)
    assert_within_budget(y, exact, expected)


@kinds
def test_delta_weight(kind):
    layer = make(kind, torch.bfloat16, alpha=3)
    args = (layer.lora_A.detach(), layer.lora_B.detach())
    assert_call_within_budget(lambda *_: layer.delta_weight(), lambda a, b: 3 / R * (b @ a), args)


@kinds
def test_merging_twice_or_unmerging_nothing_warns(kind):
    layer = make(kind)
    with pytest.warns(UserWarning, match="not merged: nothing to do"):
        layer.unmerge()
    layer.merge()
    first = layer._merged_weight
    with pytest.warns(UserWarning, match="already merged: nothing to do"):
        layer.merge()
    assert layer._merged_weight is first


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(kind, bad):
    layer = make(kind)
    with torch.no_grad():
        layer.lora_A[1, 2] = bad
    before = _bits(layer)
    with pytest.raises(ValueError, match="non-finite values"):
        layer.merge(safe=True)
    assert not layer.merged
    for key, value in layer.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8))
    layer.merge()
    assert layer.merged


@kinds
def test_a_safe_merge_sees_the_overflow_of_the_rounding(kind):
    layer = make(kind, torch.float16)
    with torch.no_grad():
        layer.lora_B.fill_(3e4)
        layer.lora_A.fill_(1.0)
    with pytest.raises(ValueError, match="non-finite values in float16"):
        layer.merge(safe=True)
    with pytest.raises(ValueError, match="non-finite"):
        layer.to_linear(safe=True)
    assert layer.to_linear(safe=True, dtype=torch.float32).weight.isfinite().all()


@kinds
def test_training_while_merged_is_refused(kind):
    layer = make(kind).train()
    layer.merge()
    x = torch.randn(2, K)
    with pytest.raises(RuntimeError, match=r"call unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        y = layer(x)
    layer.eval()
    assert torch.equal(layer(x), y)
    layer.train().requires_grad_(False)
    assert torch.equal(layer(x), y)
    layer.requires_grad_(True).unmerge()
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None


@kinds
def test_gradients_pass_through_a_merged_layer(kind):
    layer = make(kind).eval()
    layer.merge()
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    merged = layer._merged_weight
    args = (torch.ones(2, N), merged)
    assert_call_within_budget(lambda *_: x.grad, lambda dy, w: dy @ w, args)


@kinds
def test_a_disabled_adapter_is_the_base_merged_or_not(kind):
    layer = make(kind).eval()
    x = torch.randn(2, K)
    base = layer._base_forward(x)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), base)
    layer.merge()
    assert torch.equal(layer(x), base)


@kinds
@dtypes
def test_to_linear(kind, dtype):
    layer = make(kind, dtype).eval()
    linear = layer.to_linear()
    layer.merge()
    assert type(linear) is nn.Linear and not linear.training
    assert torch.equal(linear.weight, layer._merged_weight)
    assert linear.bias is layer.bias and not linear.weight.requires_grad
    assert (linear.in_features, linear.out_features) == (K, N)
    x = torch.randn(3, K, dtype=dtype)
    assert torch.equal(linear(x), layer(x))


def test_a_tied_weight_survives_merging():
    embedding, head = nn.Embedding(N, K), nn.Linear(K, N, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head, r=R)
    nn.init.normal_(layer.lora_B)
    assert layer.weight is embedding.weight
    before = embedding.weight.clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    assert layer.weight is embedding.weight


def test_merging_into_4_bits():
    layer = make("qlora", torch.bfloat16).bfloat16().eval()  # the adapter too
    x = torch.randn(3, K, dtype=torch.bfloat16)
    y, before = layer(x), _bits(layer)
    merged = layer.merged_weight(dtype=torch.float32)
    layer.merge(requantize=True)
    assert layer.merged and layer._merged_weight is None
    expected = NF4Linear.from_linear(_linear(merged, layer.bias)).eval()
    assert torch.equal(layer(x), expected(x))
    other = layer.to_nf4_linear()
    assert type(other) is NF4Linear and not other.training
    assert other.weight.dtype == torch.bfloat16
    assert torch.equal(other(x), layer(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.half()
    assert layer.weight.absmax.dtype == layer._stored("merged_").absmax.dtype == torch.uint8
    assert layer._stored("merged_").nested_absmax.dtype == torch.float32
    layer.bfloat16().unmerge()
    assert not layer.merged and "merged_packed" not in dict(layer.named_buffers())
    layer.load_state_dict(before)
    assert torch.equal(layer(x), y)


def _linear(weight, bias):
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear


def test_requantising_keeps_the_format():
    linear = nn.Linear(K, N)
    options = {"block_size": 128, "double_quant": False, "quant_type": "fp4"}
    layer = QLoRALinear.from_linear(linear, r=R, **options)
    nn.init.normal_(layer.lora_B)
    weight = layer.to_nf4_linear().weight
    assert (weight.block_size, weight.is_nested, weight.quant_type) == (128, False, "fp4")


def test_requantising_refuses_what_is_not_finite():
    layer = make("qlora")
    with torch.no_grad():
        layer.lora_B.fill_(float("inf"))
    with pytest.raises(ValueError, match="non-finite"):
        layer.merge(requantize=True)
    assert not layer.merged


def test_loading_a_requantised_layer_quantises_anew():
    layer, other = make("qlora").eval(), make("qlora").eval()
    layer.merge(requantize=True)
    layer.load_state_dict(other.state_dict())
    other.merge(requantize=True)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), other(x))


def test_a_merged_4_bit_layer_takes_any_dtype():
    layer = make("qlora", torch.bfloat16).eval()
    layer.merge()
    x = torch.randn(3, K)
    w, bias = layer._merged_weight.float(), layer.bias.float()
    assert torch.equal(layer(x), nn.functional.linear(x, w, bias))
