"""Every layer under torch.jit.trace, torch.export and torch.compile: the same as in eager mode."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.variants import as_tuple
from tests.tracing.layers import LAYERS, adapted, gate_up, input_for, mlp, packed

SCALES = 12
# A trace keeps the slots that these had for each row of the batch.
ROUTED = ("pooled", "pooled-embedding", "in-training")


@pytest.fixture(autouse=True)
def _forget() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def _equal(actual: object, expected: object) -> bool:
    pairs = zip(as_tuple(actual), as_tuple(expected), strict=True)
    return all(torch.equal(got, want) for got, want in pairs)


def _step(run: Callable[[Tensor], object], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients, with the default generator at a fixed state."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = as_tuple(run(x))
    learned = [p for p in layer.parameters() if p.requires_grad]
    loss = sum(t.float().square().sum() for t in y)
    grads = torch.autograd.grad(loss, [x, *learned], allow_unused=True)
    return [*y, *(g for g in grads if g is not None)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # which pytest makes errors of
@pytest.mark.parametrize("name", LAYERS)
def test_jit_trace(name: str) -> None:
    """For running alone the module can be saved; in training its gradients are there.

    torch's own check of a trace takes no autograd function: no two of them are equal to it.
    """
    layer = LAYERS[name]("cpu").eval()
    x, other = input_for(layer), input_for(layer, seed=1)
    inputs = [other] if name.endswith(ROUTED) else [other, other[:2, :, :].repeat(4, 2, 1)]
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for run in (traced, torch.jit.load(file)):
            assert all(_equal(run(given), layer(given)) for given in inputs)
    if "pooled" in name:
        return  # a pool is for serving: nothing in it learns
    traced = torch.jit.trace(layer, x, check_trace=False)
    for given in inputs:
        assert _equal(_step(traced, layer, given), _step(layer, layer, given))


def test_jit_trace_says_nothing_of_our_checks() -> None:
    script = [
        "import warnings, torch, lora_kernels",
        "layer = lora_kernels.QLoRALinear(16, 8, r=2)",
        "with warnings.catch_warnings(record=True) as caught, torch.no_grad():",
        "    torch.jit.trace(layer, torch.zeros(3, 16))",
        "print([str(w.message) for w in caught if w.category is torch.jit.TracerWarning])",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("name", LAYERS)
def test_export(name: str) -> None:
    layer = LAYERS[name]("cpu").eval()
    x, other = input_for(layer), input_for(layer, seed=1)
    program = torch.export.export(layer, (x,))
    with torch.no_grad():
        assert _equal(program.module()(other), layer(other))


class Model(nn.Module):
    """An attention's and an MLP's layers around what torch has between them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv, self.mlp = packed(kind), mlp(kind)
        self.up = adapted(kind, k=48, n=96, use_dora=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        mixed = torch.cat([torch.softmax(q[..., :16] @ k.mT, -1) @ v] * 3, dim=-1)
        return self.mlp(x + self.up(mixed))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_export_of_a_model_with_any_batch(kind: str) -> None:
    model = Model(kind).eval()
    x = input_for(model)
    shapes = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(model, (x,), dynamic_shapes=(shapes,))
    other = torch.randn(7, 9, 96)
    with torch.no_grad():
        assert _equal(program.module()(other), model(other))


SCALED: dict[str, Callable[[str, float], nn.Module]] = {
    "plain": lambda kind, alpha: adapted(kind, alpha=alpha),
    "rslora": lambda kind, alpha: adapted(kind, alpha=alpha, use_rslora=True),
    "dropout": lambda kind, alpha: adapted(kind, alpha=alpha, dropout=0.1),
    "dora": lambda kind, alpha: adapted(kind, alpha=alpha, use_dora=True),
    "qkv": lambda kind, alpha: packed(kind, alpha=alpha),
    "gate-up": lambda kind, alpha: gate_up(kind, alpha=alpha),
    "mlp": lambda kind, alpha: mlp(kind, alpha=alpha),
}


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("name", SCALED)
def test_layers_of_any_scale_share_two_graphs(name: str, kind: str) -> None:
    """One with the first layer's scale as a constant, one for every other."""
    counter = CompileCounterWithBackend("aot_eager")
    for alpha in range(3, 3 + 2 * SCALES, 2):
        layer = SCALED[name](kind, alpha)
        x = input_for(layer, seed=alpha)
        compiled = torch.compile(layer, backend=counter, fullgraph=True)
        assert _equal(_step(compiled, layer, x), _step(layer, layer, x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_whose_alpha_is_set_anew(grad: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = adapted("lora")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = input_for(layer)
    with torch.set_grad_enabled(grad):
        for alpha in (-8, 0, 16, 0.1, 3, 7.25):
            layer.alpha = alpha
            assert layer.scale == alpha / 4
            assert _equal(compiled(x), layer(x))
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "dora", "qkv"])
def test_any_scale_with_inductor(name: str) -> None:
    for alpha in (8, 3, 5):
        layer = SCALED[name]("lora", alpha)
        x, compiled = input_for(layer), torch.compile(layer, fullgraph=True)
        with torch.no_grad():
            assert _equal(compiled(x), layer(x))


def test_scale_follows_whatever_it_is_made_of() -> None:
    layer = adapted("lora", alpha=8)
    assert layer.scale == 2
    layer.use_rslora = True
    assert layer.scale == 4
    layer.r = 16
    assert layer.scale == 2
    layer.alpha = 1
    assert layer.scale == 0.25
