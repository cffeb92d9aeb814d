"""State dicts, copies, casts and the meta device of layers with use_dora=True."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels.testing import assert_call_within_budget
from tests.nn.dora_layers import (
    MAGNITUDE,
    assert_magnitude_is_the_norm,
    make,
    plain,
    plain_args,
)
from tests.nn.layers import KINDS, K, N, R

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, assign):
    layer, other = make(kind), make(kind)
    state = layer.state_dict()
    assert MAGNITUDE in state
    x = torch.randn(3, K)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), layer(x)) and other.lora_magnitude_vector.requires_grad


@kinds
def test_a_plain_checkpoint_sets_the_magnitude(kind):
    layer = make(kind)
    a, b = layer.lora_A.clone(), layer.lora_B.clone()
    linear = nn.Linear(K, N)
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.lora_A, a) and torch.equal(layer.lora_B, b)
    assert_magnitude_is_the_norm(layer)


@kinds
def test_a_lora_checkpoint_sets_the_magnitude_but_misses_it(kind):
    layer = make(kind)
    lora = KINDS[kind](K, N, r=R)
    nn.init.normal_(lora.lora_B)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{MAGNITUDE}"'):
        layer.load_state_dict(lora.state_dict())
    result = layer.load_state_dict(lora.state_dict(), strict=False)
    assert result.missing_keys == [MAGNITUDE]
    assert_magnitude_is_the_norm(layer)
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{MAGNITUDE}"'):
        lora.load_state_dict(layer.state_dict())


@kinds
def test_loading_nothing_changes_nothing(kind):
    layer = make(kind)
    before = layer.lora_magnitude_vector.clone()
    layer.load_state_dict({}, strict=False)
    layer.load_state_dict({"bias": torch.zeros(N)}, strict=False)
    assert torch.equal(layer.lora_magnitude_vector, before)


@kinds
def test_loading_a_merged_layer_merges_anew(kind):
    layer, other = make(kind).eval(), make(kind).eval()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer._merged_weight, other.merged_weight())


@kinds
def test_reset(kind):
    layer = make(kind)
    layer.reset_magnitude()
    assert_magnitude_is_the_norm(layer)
    layer.reset_adapter()
    assert not layer.lora_B.any()
    assert_magnitude_is_the_norm(layer)
    layer.reset_parameters()
    assert_magnitude_is_the_norm(layer)


@kinds
def test_copies_are_equal_and_apart(kind):
    layer = make(kind).eval()
    x = torch.randn(3, K)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for other in [*copies, torch.load(buffer, weights_only=False)]:
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.lora_magnitude_vector.zero_()
        assert layer.lora_magnitude_vector.all()
    assert torch.equal(layer(x), y)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_dtype(kind, dtype):
    layer = make(kind).to(dtype)
    assert layer.lora_magnitude_vector.dtype == dtype
    x = torch.randn(3, K, dtype=dtype)
    assert_call_within_budget(lambda x, *_: layer(x).detach(), plain, plain_args(layer, x))


@kinds
def test_meta_device(kind):
    layer = KINDS[kind](K, N, r=R, use_dora=True, device="meta")
    assert layer.lora_magnitude_vector.is_meta
    assert set(layer.state_dict()) == set(make(kind).state_dict())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_magnitude_is_the_norm(layer)
    other = KINDS[kind](K, N, r=R, use_dora=True, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x))
