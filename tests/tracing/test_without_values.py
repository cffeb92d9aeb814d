"""Every layer made, called and saved where tensors have a shape and a device but no values."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tests.ops.variants import as_tuple
from tests.tracing.layers import LAYERS, input_for


def _step(layer: nn.Module, x: Tensor) -> list[tuple]:
    """What outputs and gradients look like."""
    x = x.detach().requires_grad_()
    y = as_tuple(layer(x))
    if any(t.requires_grad for t in y):
        sum(t.float().sum() for t in y).backward()
    with torch.no_grad():
        assert [t.shape for t in as_tuple(layer(x))] == [t.shape for t in y]
    found = [*y, x.grad, *(p.grad for p in layer.parameters())]
    return [None if t is None else (t.shape, t.dtype, t.device.type) for t in found]


def _all_of(layer: nn.Module, x: Tensor) -> list:
    steps = [_step(layer.train(training), x) for training in _modes(layer)]
    state = layer.state_dict()
    # The JSON entry of a 4-bit weight names its offset, whose digits only a value has.
    sizes = {k: t.shape for k, t in state.items() if "quant_state" not in k}
    repr(layer)
    return [steps, list(state), sizes]


def _modes(layer: nn.Module) -> tuple[bool, ...]:
    return (False,) if getattr(layer, "merged", False) else (True, False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", ["meta", "fake", "fake around a real layer"])
def test_it_looks_as_it_does_with_values(name: str, way: str) -> None:
    device = "meta" if way == "meta" else "cpu"
    real = LAYERS[name]("cpu")
    expected = _all_of(real, input_for(real))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.nullcontext() if way == "meta" else mode:
        layer = real if way == "fake around a real layer" else LAYERS[name](device)
        layer.zero_grad()
        actual = _all_of(layer, input_for(layer, device))
    assert str(actual).replace("'meta'", "'cpu'") == str(expected)
