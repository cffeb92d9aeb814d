"""The short way of a plain output layer (nn/frozen_linear.py)."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.nn.frozen_linear import ShortForward, is_short, restore, shorten
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama


def head(dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Linear:
    torch.manual_seed(5)
    layer = nn.Linear(192, 97, bias=bias).to(dtype).requires_grad_(False)
    shorten(layer)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (0,), (1, 1), (2, 4), (3, 5)], ids=str)
def test_within_the_budget(leading: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    layer = head(dtype, bias)
    x = torch.randn(*leading, 192).to(dtype)
    with torch.no_grad():
        y = layer(x)
        plain = nn.Linear.forward(layer, x)
    oracle = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    assert_within_budget(y, oracle, plain, "y")


def test_gradients_and_autocast_are_torch_own() -> None:
    layer = head()
    x = torch.randn(2, 192).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0, dtype=torch.float32).bfloat16().expand(2, -1))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 192)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):  # torch's own words
        layer(torch.randn(2, 191).bfloat16())
    assert layer.to("meta")(torch.empty(2, 192, dtype=torch.bfloat16, device="meta")).is_meta


def test_the_forward_is_the_copy_s_own() -> None:
    layer = head()
    x = torch.randn(1, 192).bfloat16()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert is_short(other) and torch.equal(other(x), layer(x))
        other.weight.zero_()
        assert torch.equal(other(x), layer.bias.expand(1, -1))
    gc.disable()
    try:
        alive = weakref.ref(layer)
        del layer
        assert alive() is None
    finally:
        gc.enable()


def test_only_a_plain_layer_gets_it() -> None:
    class Own(nn.Linear):
        pass

    own, lora = Own(8, 8), lk.LoRALinear(8, 8, r=2)
    taken = nn.Linear(8, 8)
    taken.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for layer in (own, lora, taken, None):
        shorten(layer)
        assert layer is None or not is_short(layer)
    restore(taken)
    assert "forward" in vars(taken)


def test_a_model_s_output_layer_has_it_while_it_has_adapters() -> None:
    model = llama().bfloat16()
    ids = torch.tensor([[1, 2, 3]])
    before = model.state_dict().keys()
    with torch.no_grad():
        logits = model(ids).logits
        oracle = copy.deepcopy(model).double()(ids).logits
    lk.apply_lora(model)
    assert is_short(model.lm_head) and type(model.lm_head) is nn.Linear
    assert "lm_head.weight" in model.state_dict()
    with torch.no_grad():
        assert_within_budget(model(ids).logits, oracle, logits)
    assert lk.fuse_loss(model)  # it is a plain output layer to others
    lk.unload(model)
    assert not is_short(model.lm_head) and model.state_dict().keys() == before
    lk.quantize_model(model)
    assert isinstance(vars(model.lm_head)["forward"], ShortForward)
