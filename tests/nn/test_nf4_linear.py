"""NF4Linear: storage, state dict, devices, casts."""

from __future__ import annotations

import json
from operator import attrgetter

import pytest
import torch
from torch import nn

from lora_kernels import NF4Weight
from lora_kernels.nn import NF4Linear, QLoRALinear
from lora_kernels.testing import assert_call_within_budget
from tests.nn.layers import K, N

FORMATS = [
    {"block_size": 64, "double_quant": True, "quant_type": "nf4"},
    {"block_size": 64, "double_quant": False, "quant_type": "nf4"},
    {"block_size": 256, "double_quant": True, "quant_type": "fp4"},
    {"block_size": 32, "double_quant": False, "quant_type": "fp4"},
]
formats = pytest.mark.parametrize("form", FORMATS)
classes = pytest.mark.parametrize("cls", [NF4Linear, QLoRALinear])


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_linear_with_the_decoded_weight(form, dtype):
    layer = NF4Linear.from_linear(nn.Linear(K, N), **form)
    x = torch.randn(4, 3, K, dtype=dtype)
    args = (x, layer.weight.dequantize(dtype), layer.bias.detach().to(dtype))
    assert_call_within_budget(lambda *_: layer(x).detach(), nn.functional.linear, args)


@formats
def test_weight_is_what_quantize_gives(form):
    linear = nn.Linear(K, N).bfloat16()
    weight = NF4Linear.from_linear(linear, **form).weight
    expected = NF4Weight.quantize(linear.weight, **form)
    assert weight.meta == expected.meta and weight.dtype == torch.bfloat16
    for name, t in expected.tensors().items():
        assert torch.equal(t, weight.tensors()[name]), name


def test_nothing_trains():
    layer = NF4Linear.from_linear(nn.Linear(K, N))
    assert not any(p.requires_grad for p in layer.parameters())
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(2, K, requires_grad=True)
    layer(x).sum().backward()
    w = layer.weight.dequantize(torch.float32)
    assert_call_within_budget(lambda *_: x.grad, lambda dy, w: dy @ w, (torch.ones(2, N), w))


@classes
@formats
def test_casts_leave_the_codes_alone(cls, form):
    layer = cls.from_linear(nn.Linear(K, N), **form)
    before = {k: v.clone() for k, v in layer.weight.tensors().items()}
    casts = (
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float32),
    )
    for cast in casts:
        cast(layer)
        assert layer.bias.dtype != torch.uint8
        for name, t in layer.weight.tensors().items():
            assert t.dtype == before[name].dtype and torch.equal(t, before[name]), name


@classes
@formats
def test_meta_and_back(cls, form):
    layer = cls(K, N, **form, device="meta")
    assert all(t.is_meta for t in layer.weight.tensors().values())
    made = cls.from_linear(nn.Linear(K, N), **form)
    assert {k: v.shape for k, v in layer.weight.tensors().items()} == {
        k: v.shape for k, v in made.weight.tensors().items()
    }
    layer.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(2, K)
    assert torch.equal(layer(x), made(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@classes
@formats
def test_every_key_is_a_path_of_attributes(cls, form, device):
    """torch.distributed.checkpoint looks the keys of a state dict up this way."""
    layer = cls(K, N, **form, device=device)
    for key, value in layer.state_dict().items():
        found = attrgetter(key)(layer)
        if key == "weight":
            assert isinstance(found, NF4Weight)
        elif device == "cpu":
            assert torch.equal(found, value), key


def test_loading_into_meta_without_assign_warns():
    layer = NF4Linear(K, N, bias=False, device="meta")
    made = NF4Linear(K, N, bias=False)
    with pytest.warns(UserWarning, match="assign=True"):
        layer.load_state_dict(made.state_dict())
    assert layer.packed.is_meta


@classes
def test_loading_takes_over_the_format(cls):
    made = cls.from_linear(nn.Linear(K, N), block_size=128, double_quant=False, quant_type="fp4")
    layer = cls(K, N)
    layer.load_state_dict(made.state_dict())
    assert layer.weight.meta == made.weight.meta
    assert layer.nested_absmax is None
    x = torch.randn(2, K)
    assert torch.equal(layer(x), made(x))


def test_a_dense_weight_is_quantised_on_loading():
    linear = nn.Linear(K, N)
    layer = NF4Linear(K, N, block_size=32, double_quant=False)
    layer.load_state_dict(linear.state_dict())
    expected = NF4Weight.quantize(linear.weight, 32, False)
    assert torch.equal(layer.packed, expected.packed)
    assert torch.equal(layer.absmax, expected.absmax)


def test_what_cannot_be_loaded_is_said():
    layer = NF4Linear(K, N)
    good = layer.state_dict()
    wrong_shape = nn.Linear(K, N + 1).state_dict()
    with pytest.raises(RuntimeError, match=r"weight: got shape \[49, 96\], expected \[48, 96\]"):
        layer.load_state_dict(wrong_shape | {"bias": good["bias"]})
    with pytest.raises(RuntimeError, match=r"got shape \[96, 48\], expected \[48, 96\]"):
        layer.load_state_dict(NF4Linear(N, K).state_dict() | {"bias": good["bias"]})
    with pytest.raises(RuntimeError, match=r"weight.absmax: is missing"):
        layer.load_state_dict({k: v for k, v in good.items() if k != "weight.absmax"})
    with pytest.raises(RuntimeError, match=r"quant_state.bitsandbytes__nf4"):
        layer.load_state_dict({k: v for k, v in good.items() if "bitsandbytes" not in k})
    with pytest.raises(RuntimeError, match=r"is (nan|inf), expected finite"):
        dense = torch.full((N, K), float("nan"))
        layer.load_state_dict({"weight": dense, "bias": good["bias"]})


def test_state_dict_keys_are_those_of_bitsandbytes():
    state = NF4Linear.from_linear(nn.Linear(K, N)).state_dict(prefix="a.b.")
    assert set(state) == {
        "a.b.bias",
        "a.b.weight",
        "a.b.weight.absmax",
        "a.b.weight.quant_map",
        "a.b.weight.nested_absmax",
        "a.b.weight.nested_quant_map",
        "a.b.weight.quant_state.bitsandbytes__nf4",
    }
    info = json.loads(bytes(state["a.b.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert info["shape"] == [N, K] and info["blocksize"] == 64
    assert state["a.b.weight"].shape == (N * K // 2, 1)


def test_state_dict_can_be_saved_as_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    model = nn.Sequential(NF4Linear(K, N), nn.ReLU(), NF4Linear(N, K))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    other = nn.Sequential(NF4Linear(K, N), nn.ReLU(), NF4Linear(N, K))
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    x = torch.randn(2, K)
    assert torch.equal(other(x), model(x))


def test_to_linear():
    layer = NF4Linear.from_linear(nn.Linear(K, N).bfloat16()).eval()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear and not linear.training
    assert linear.weight.dtype == torch.bfloat16
    assert torch.equal(linear.weight, layer.weight.dequantize())
    assert layer.to_linear(dtype=torch.float32).weight.dtype == torch.float32


@classes
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (7, 1), (3, 33)])
def test_odd_sizes(cls, shape):
    n, k = shape
    layer = cls(k, n)
    assert layer(torch.randn(2, k)).shape == (2, n)
    other = cls(k, n)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.packed, layer.packed)


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((K, N), {"block_size": 48}, ValueError, "block_size: got 48"),
        ((K, N), {"quant_type": "int4"}, ValueError, "quant_type: got 'int4'"),
        ((-1, N), {}, ValueError, "in_features: got -1"),
        ((K, 1.5), {}, TypeError, "out_features: got 1.5"),
    ],
)
@classes
def test_bad_options(cls, args, options, error, match):
    with pytest.raises(error, match=match):
        cls(*args, **options)


def test_non_finite_weights_are_refused():
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"is (nan|inf), expected finite"):
        NF4Linear.from_linear(linear)


def test_repr():
    layer = NF4Linear(K, N, block_size=128, double_quant=False)
    assert repr(layer) == (
        "NF4Linear(in_features=96, out_features=48, bias=True, quant_type=nf4, block_size=128, "
        "double_quant=False)"
    )
