"""The gated activation: against torch's own, its derivative, its far ends, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import functional as F
from lora_kernels import use_backend
from lora_kernels.testing import assert_call_within_budget
from tests.ops.packed_calls import ACTS
from tests.ops.variants import all_variants

VARIANTS = [v for v in all_variants() if v.backend != "triton" and v.device == "cpu"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
activations = pytest.mark.parametrize("activation", ACTS)


def _both(fn):
    """The result and both gradients as one function."""

    def call(g, u, dh):
        g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
        h = fn(g, u)
        return h.detach(), *torch.autograd.grad(h, (g, u), dh)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@activations
def test_is_torchs_activation(activation, variant, dtype):
    """Over the whole range in which the activations bend."""
    g = torch.linspace(-9, 9, 5001).to(dtype)
    u, dh = torch.randn(2, 5001).to(dtype)
    with variant.active():
        assert_call_within_budget(
            _both(lambda g, u: F.gated_activation(g, u, activation)),
            _both(lambda g, u: ACTS[activation](g) * u),
            (g, u, dh),
            names=("h", "dg", "du"),
        )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@activations
def test_gradcheck(activation, lead):
    g, u = (torch.randn(*lead, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda g, u: F.gated_activation(g, u, activation), (g, u))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@activations
def test_far_from_zero(activation, variant):
    """0 on one side, the identity on the other, NaN where there is one."""
    g = torch.tensor([300.0, -300.0, 0.0, float("nan")], requires_grad=True)
    with variant.active():
        h = F.gated_activation(g, torch.full((4,), 2.0), activation)
        h.sum().backward()
    assert torch.equal(h[:3].abs(), torch.tensor([600.0, 0.0, 0.0])) and h[3].isnan()
    assert torch.equal(g.grad[:3].abs(), torch.tensor([2.0, 0.0, 1.0])) and g.grad[3].isnan()


@activations
def test_the_backward_gives_the_forwards_h(activation):
    """What the MLP relies on: h made again is h, bit for bit."""
    index = list(ACTS).index(activation)
    for variant in VARIANTS:
        for dtype in DTYPES:
            dh, g, u = torch.randn(3, 7, 37).to(dtype)
            with variant.active():
                h = torch.ops.lora_kernels.glu_fwd(g, u, index)
                *_, again = torch.ops.lora_kernels.glu_bwd(dh, g, u, index, True)
            assert torch.equal(h, again)


def test_saved_are_the_two_inputs():
    g, u = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.gated_activation(g, u)
    assert [t.data_ptr() for t in kept] == [g.data_ptr(), u.data_ptr()]


@pytest.mark.parametrize("asked", ["gate", "up"])
def test_only_what_requires_a_gradient_gets_one(asked):
    t = {name: torch.randn(4, 6).requires_grad_(name == asked) for name in ("gate", "up")}
    F.gated_activation(**t).sum().backward()
    assert {name for name, v in t.items() if v.grad is not None} == {asked}
    assert not F.gated_activation(torch.randn(3), torch.randn(3)).requires_grad


def test_fullgraph_with_a_dynamic_batch():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(F.gated_activation, backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 3, 17):
        results = []
        for fn in (F.gated_activation, compiled):
            torch.manual_seed(batch)
            g, u = (torch.randn(batch, 2, 12, requires_grad=True) for _ in range(2))
            h = fn(g, u)
            results.append([h.detach(), *torch.autograd.grad(h.square().sum(), (g, u))])
        assert all(map(torch.equal, *results))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": torch.ones(())}, ValueError, r"gate: got shape \[\], expected \[\.\.\., I\]"),
        ({"gate": torch.ones(2, 3).int()}, TypeError, "gate: got dtype int32"),
        ({"up": torch.ones(3)}, ValueError, r"up: got shape \[3\], expected \[2, 3\]"),
        ({"up": torch.ones(2, 3).half()}, TypeError, "up: got dtype float16, expected float32"),
        ({"up": torch.ones(2, 3, device="meta")}, ValueError, "up: is on meta, expected cpu"),
        ({"activation": "relu"}, ValueError, "activation: got 'relu', expected one of silu, gelu"),
    ],
)
def test_bad_input(changes, error, message):
    given = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3)}
    F.gated_activation(**given)
    with pytest.raises(error, match=f"^{message}"):
        F.gated_activation(**given | changes)
