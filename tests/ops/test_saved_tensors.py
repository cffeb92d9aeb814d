"""Every function's gradients where torch keeps what it saves elsewhere, or makes it again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ops.public_calls import (
    CALLS,
    Call,
    Tensors,
    assert_same,
    results_and_gradients,
)

calls = pytest.mark.parametrize("call", CALLS, ids=str)


def _step(call: Call, run: Callable | None = None, context: Callable = nullcontext) -> list[Tensor]:
    """Outputs and every gradient, with what the call gets passed through an operation first, as a
    layer's input is."""
    t, fixed = call.tensors(), call.fixed()
    names = list(t)

    def body(*values: Tensor) -> tuple[Tensor, ...]:
        given: Tensors = {n: v * 1 for n, v in zip(names, values, strict=True)}
        return call.outputs(given, fixed)

    with context():
        outputs = body(*t.values()) if run is None else run(body, *t.values())
    return results_and_gradients(outputs, t)


@calls
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(call: Call, use_reentrant: bool):
    run = lambda body, *v: checkpoint(body, *v, use_reentrant=use_reentrant)  # noqa: E731
    assert_same(_step(call, run), _step(call))


@calls
def test_nested_checkpoints(call: Call):
    def run(body, *values):
        inner = lambda *v: checkpoint(body, *v, use_reentrant=False)  # noqa: E731
        return checkpoint(inner, *values, use_reentrant=False)

    assert_same(_step(call, run), _step(call))


@calls
def test_save_on_cpu(call: Call):
    assert_same(_step(call, context=torch.autograd.graph.save_on_cpu), _step(call))


@calls
def test_each_saved_tensor_is_read_once(call: Call):
    reads: list[int] = []

    def context():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda v: (len(reads), reads.append(0), v), lambda kept: _read(reads, kept)
        )

    def _read(reads, kept):
        reads[kept[0]] += 1
        return kept[2]

    assert_same(_step(call, context=context), _step(call))
    assert reads and max(reads) == 1


@calls
def test_compiled_checkpoint(call: Call):
    """As transformers' trainer runs a compiled model with gradient checkpointing."""
    torch._dynamo.reset()

    def run(body, *values):
        inner = lambda *v: checkpoint(body, *v, use_reentrant=False)  # noqa: E731
        return torch.compile(inner, backend="aot_eager")(*values)

    assert_same(_step(call, run), _step(call))
