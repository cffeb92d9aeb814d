"""What torch asks of an op: schema, fake implementation, tracing, and whole-graph compilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import NF4Weight
from lora_kernels import functional as F
from lora_kernels.testing import assert_within_budget
from tests.ops.case import Case
from tests.ops.grid import grid
from tests.ops.inputs import GENERATORS, cases
from tools.op_inputs.calls import call

N, K, R = 12, 20, 3


def _core():
    for op in GENERATORS:
        for case in cases(op):
            if case.core:
                name, mark = f"{op}-{case.label}", grid(case, case.build())
                yield pytest.param(case, id=name, marks=mark)


def test_every_op_has_core_cases():
    for op in GENERATORS:
        assert sum(case.core for case in cases(op)) >= 3, op


@pytest.mark.parametrize("case", list(_core()))
def test_opcheck(case: Case):
    torch.library.opcheck(getattr(torch.ops.lora_kernels, case.op).default, case.build())


@pytest.mark.parametrize("case", list(_core()))
def test_meta_device_gives_the_metadata_of_the_cpu(case: Case):
    op = getattr(torch.ops.lora_kernels, case.op).default
    real, meta = call(op, case.build()), call(op, case.build("meta"))
    for r, m in zip(real.values(), meta.values(), strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.dtype, m.stride()) == (r.shape, r.dtype, r.stride())


def _lora_linear(x, t):
    return F.lora_linear(
        x,
        t["weight"],
        t["a"],
        t["b"],
        scale=0.5,
        bias=t["bias"],
        dropout_p=0.3,
        rank_diag=t["rank_diag"],
        out_diag=t["out_diag"],
        seed=t.get("seed"),
    )


def _nf4_lora_linear(x, t):
    return F.nf4_lora_linear(
        x, t["qweight"], t["a"], t["b"], scale=0.5, dropout_p=0.3, seed=t.get("seed")
    )


def _nf4_linear(x, t):
    return F.nf4_linear(x, t["qweight"], bias=t["bias"])


CALLS = {
    "lora_linear": _lora_linear,
    "nf4_lora_linear": _nf4_lora_linear,
    "nf4_linear": _nf4_linear,
}
USED = {
    "lora_linear": ("weight", "a", "b", "bias", "rank_diag", "out_diag"),
    "nf4_lora_linear": ("a", "b"),
    "nf4_linear": ("bias",),
}


def _tensors(dtype: torch.dtype) -> dict:
    g = torch.Generator().manual_seed(3)
    sizes = {"weight": (N, K), "a": (R, K), "b": (N, R), "bias": (N,)}
    sizes |= {"rank_diag": (R,), "out_diag": (N,)}
    t = {k: torch.randn(s, generator=g).to(dtype).requires_grad_() for k, s in sizes.items()}
    t["qweight"] = NF4Weight.quantize(t["weight"].detach(), 32)
    return t


def _step(call, x, t, used):
    """Output and every gradient of one call, with the default generator at a fixed state."""
    torch.manual_seed(11)
    x = x.detach().requires_grad_()
    y = call(x, t)
    grads = torch.autograd.grad(y, [x, *(t[k] for k in used)], torch.ones_like(y))
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_with_a_dynamic_batch(name, dtype):
    """One graph for every batch size, the same bits as eager, forward and backward."""
    t = _tensors(dtype)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 3, 8, 64):
        x = torch.randn(batch, 2, K).to(dtype)
        expected = _step(CALLS[name], x, t, USED[name])
        actual = _step(compiled, x, t, USED[name])
        for want, got in zip(expected, actual, strict=True):
            assert torch.equal(want, got)
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, 4, K)], ids=str)
def test_fullgraph_any_leading_dimensions(shape):
    t = _tensors(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(_nf4_lora_linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(shape)
    expected = _step(_nf4_lora_linear, x, t, ("a", "b"))
    for want, got in zip(expected, _step(compiled, x, t, ("a", "b")), strict=True):
        assert torch.equal(want, got)


def test_automatic_dynamic_compiles_at_most_twice():
    t = _tensors(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_lora_linear, backend=counter, fullgraph=True)
    for batch in (4, 6, 9, 31):
        _step(compiled, torch.randn(batch, K), t, USED["lora_linear"])
    assert counter.frame_count == 2


def test_a_compiled_call_draws_a_new_seed_each_time():
    t = _tensors(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(_nf4_lora_linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(16, K)
    first, second = compiled(x, t), compiled(x, t)
    assert not torch.equal(first, second)


def test_dropout_mask_compiles():
    torch._dynamo.reset()
    seed = torch.tensor([7])
    compiled = torch.compile(
        lambda s: F.dropout_mask((4, 9), 0.4, s, 2), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(seed), F.dropout_mask((4, 9), 0.4, seed, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_inductor(name):
    """Inductor sees the ops as opaque calls: they run as in eager mode, on its buffers."""
    t = _tensors(torch.float32) | {"seed": torch.tensor([5])}
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True)
    for batch in (5, 8):
        x = torch.randn(batch, K)
        plain = _step(CALLS[name], x, t, USED[name])
        double = {
            k: v.detach().double().requires_grad_()
            if isinstance(v, torch.Tensor) and k != "seed"
            else v
            for k, v in t.items()
        }
        oracle = _step(CALLS[name], x.double(), double, USED[name])
        actual = _step(compiled, x, t, USED[name])
        for label, got, exact, want in zip(
            ("y", "x", *USED[name]), actual, oracle, plain, strict=True
        ):
            assert_within_budget(got, exact, want, label)
