"""The ops that a compiled graph calls for a layer that is not trained (ops/lora/graph.py)."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.dispatch import native
from lora_kernels.nn.frozen_linear import shorten
from lora_kernels.testing import assert_within_budget

OPS = torch.ops.lora_kernels
N, K, R = 96, 64, 8


def arguments(dtype=torch.bfloat16, adapter=torch.float32, nf4=False, bias=True, rows=(2, 3)):
    g = torch.Generator().manual_seed(0)
    sizes = ((*rows, K), (N, K), (R, K), (N, R), (N,))
    x, w, a, b, c = (torch.randn(*s, generator=g) for s in sizes)
    w = w.to(dtype)
    q = lk.NF4Weight.quantize(w) if nf4 else None
    base, meta = (q.base, q.meta) if q else ([w], [N, K])
    return x.to(dtype), base, meta, a.to(adapter), b.to(adapter), 0.5, c.to(dtype) if bias else None


def exact(x, base, meta, a, b, scale, bias):
    w = base[0] if len(base) == 1 else OPS.nf4_dequantize(base, meta, x.dtype)
    y = x.double() @ w.double().T + scale * (x.double() @ a.double().T) @ b.double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (0, 3)], ids=str)
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lora_linear_eval_is_right(dtype, nf4, rows):
    args = arguments(dtype, nf4=nf4, rows=rows)
    y = OPS.lora_linear_eval(*args)
    assert y.shape == (*rows, N) and y.dtype == dtype
    if y.numel():
        twin = OPS.lora_linear_any(*args)
        with lk.use_backend("reference"):
            reference = OPS.lora_linear_eval(*args)
        for got in (y, twin):
            assert_within_budget(got, exact(*args), reference)


@pytest.mark.parametrize("op", ["lora_linear_eval", "lora_linear_any"])
@pytest.mark.parametrize("nf4", [False, True])
def test_the_contract_with_torch_holds(op, nf4):
    torch.library.opcheck(getattr(OPS, op).default, arguments(nf4=nf4))


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_eval_is_torchs_linear(rows, bias):
    x, (w,), _, _, _, _, c = arguments(bias=bias, rows=(rows,))
    exact = F.linear(x.double(), w.double(), None if c is None else c.double())
    assert_within_budget(OPS.linear_eval(x, w, c), exact, F.linear(x, w, c))
    torch.library.opcheck(OPS.linear_eval.default, (x, w, c))


def test_an_unusual_call_goes_the_usual_way():
    x, *double = arguments(torch.float64, torch.float64)
    usual, _ = OPS.lora_linear_fwd(x.flatten(0, -2), *double, 0.0, None, None, None)
    assert torch.equal(OPS.lora_linear_eval(x, *double), usual.view(2, 3, N))
    x, *rest = arguments()
    strided = torch.empty(2, 3, 2 * K, dtype=x.dtype)[..., ::2].copy_(x)
    assert torch.equal(OPS.lora_linear_eval(strided, *rest), OPS.lora_linear_eval(x, *rest))


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        OPS.lora_linear_eval(*arguments())
    assert counter.get_total_flops() == 2 * 6 * (N * K + R * (N + K))


def compiled(layer):
    graphs = []

    def keep(graph, example):
        graphs.append({node.target for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(layer, backend=keep, fullgraph=True), graphs


@pytest.mark.skipif(not native.available(), reason="needs the compiled extension")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_graph_that_is_not_trained_calls_it(quantize):
    model = torch.nn.Sequential(torch.nn.Linear(K, N, dtype=torch.bfloat16))
    lk.apply_lora(model, r=R, quantize=quantize, target_modules=["0"])
    model.eval()
    x = torch.randn(1, 3, K).bfloat16()
    run, graphs = compiled(model)
    with torch.no_grad():
        assert torch.equal(run(x), model(x))
    assert OPS.lora_linear_eval in graphs[-1] or OPS.lora_linear_eval.default in graphs[-1]
    run(x).sum().backward()  # a graph of its own, with autograd
    assert model[0].lora_B.grad is not None


@pytest.mark.skipif(not native.available(), reason="needs the compiled extension")
def test_a_graph_calls_the_plain_op_for_a_few_rows_alone():
    layer = torch.nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False)
    shorten(layer)
    with torch.no_grad():
        for rows, ours in ((1, True), (8, True), (9, False)):
            run, graphs = compiled(lambda x: layer(x))
            x = torch.randn(rows, K).bfloat16()
            oracle = F.linear(x.double(), layer.weight.double(), layer.bias.double())
            assert_within_budget(run(x), oracle, F.linear(x, layer.weight, layer.bias))
            assert (bool({OPS.linear_eval, OPS.linear_eval.default} & graphs[-1])) == ours


def test_a_block_of_another_thread_does_not_force_this_one():
    args = arguments()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with lk.use_backend("reference"):
            inside.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    found = lk.explain(OPS.lora_linear_eval, *args)
    leave.set()
    other.join()
    assert [e.forced for e in found] == [None]
    with lk.use_backend("reference"):
        assert [e.chosen for e in lk.explain(OPS.lora_linear_eval, *args)] == ["reference"]
