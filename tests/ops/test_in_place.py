"""What a user may write over is not what is saved: operations in place on every function's output.

torch refuses a backward whose saved tensor was written over; a layer of torch lets its output be.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.public_calls import CALLS, Call, assert_same, results_and_gradients


def _changed(y: Tensor) -> Tensor:
    y += torch.linspace(-1, 1, y.numel()).view_as(y)
    return torch.relu_(y.mul_(0.5))


def _changed_elsewhere(y: Tensor) -> Tensor:
    return torch.relu((y + torch.linspace(-1, 1, y.numel()).view_as(y)) * 0.5)


def _written_over(y: Tensor) -> Tensor:
    """Its values are gone; the gradient does not need them."""
    kept = y * 1
    y.detach().fill_(float("nan"))
    return kept


def _as_it_is(y: Tensor) -> Tensor:
    return y * 1


PAIRS = {
    "add-mul-relu": (_changed, _changed_elsewhere),
    "written-over": (_written_over, _as_it_is),
}
calls = pytest.mark.parametrize("call", CALLS, ids=str)
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def _step(call: Call, after: Callable[[Tensor], Tensor], layer: Callable | None = None):
    """Results and every gradient where `after` is applied to each output."""
    t, fixed = call.tensors(), call.fixed()
    outputs = [after(y) for y in (layer or call.outputs)(t, fixed)]
    return results_and_gradients(outputs, t)


@calls
@pairs
def test_eager(call: Call, pair: tuple[Callable, Callable]):
    in_place, elsewhere = pair
    assert_same(_step(call, in_place), _step(call, elsewhere))


@calls
@pairs
def test_on_the_output_of_a_compiled_layer(call: Call, pair: tuple[Callable, Callable]):
    torch._dynamo.reset()
    in_place, elsewhere = pair
    compiled = torch.compile(call.outputs, backend="aot_eager")
    assert_same(_step(call, in_place, compiled), _step(call, elsewhere))


@calls
def test_within_a_compiled_graph(call: Call):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def body(t, fixed):
        return [_changed(y) for y in call.outputs(t, fixed)]

    assert_same(_step(call, _as_it_is, body), _step(call, _changed_elsewhere))
    assert counter.frame_count == 1
