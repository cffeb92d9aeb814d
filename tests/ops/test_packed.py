"""Packed projections and the gated MLP: the maths, what is saved, what is computed, autocast,
compilation and checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_kernels import functional as F
from lora_kernels import use_backend
from lora_kernels.dispatch import Implementation, explain, native, ops
from lora_kernels.testing import assert_within_budget
from tests.ops.packed_calls import (
    ACTS,
    KINDS,
    LAYERS,
    SEED,
    K,
    M,
    call,
    dense,
    differentiable,
    quantised,
    results,
    scales,
    tensors,
    textbook,
    total,
)
from tests.ops.variants import all_variants, as_tuple

# One instruction set is enough here: `test_parity.py` holds the ops on each to the reference.
VARIANTS = [
    v
    for v in all_variants()
    if v.backend != "triton" and v.device == "cpu" and v.isa in (None, *native.isas()[:1])
]
layers = pytest.mark.parametrize("layer", LAYERS)
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.grid
@layers
@kinds
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(layer, kind, p):
    """x, every A, B and bias, and the dense weights at once."""
    t = tensors(layer)
    weights = quantised(t, kind)
    names = differentiable(t, kind)

    def run(*values):
        given = t | dict(zip(names, values, strict=True))
        now = [given[f"w{i}"] if isinstance(w, torch.Tensor) else w for i, w in enumerate(weights)]
        return call(layer, given, now, dropout_p=p, seed=SEED)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(run, tuple(t[n] for n in names))


@pytest.mark.parametrize("activation", ACTS)
def test_gradcheck_of_the_activations(activation):
    t = tensors("mlp")

    def run(*values):
        given = dict(zip(t, values, strict=True))
        return call("mlp", given, [given[f"w{i}"] for i in range(3)], activation=activation)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(run, tuple(t.values()))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3)], ids=str)
@layers
def test_any_leading_dimensions(layer, lead):
    t = tensors(layer, torch.float32, lead=lead)
    weights = quantised(t, "mixed")
    y = call(layer, t, weights)
    want = textbook(layer, t, weights)
    for got, expected in zip(as_tuple(y), as_tuple(want), strict=True):
        assert got.shape == expected.shape
    total(y).backward()
    assert t["x"].grad.shape == t["x"].shape


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@layers
def test_is_the_textbook(layer, kind, dtype, adapters, variant):
    """Outputs and every gradient against autograd's own operations."""
    options = {"dropout_p": 0.3, "seed": SEED}
    draws = []
    for _ in range(16):  # the smallest gradients have 10 elements
        t = tensors(layer, dtype, adapters, lead=(33,))
        weights = quantised(t, kind)
        with variant.active():
            ours = results(layer, t, kind, weights, dtype, call, **options)
        plain = results(layer, t, kind, weights, dtype, textbook, **options)
        oracle = results(layer, t, kind, weights, dtype, textbook, torch.Tensor.double, **options)
        draws.append({name: (ours[name], oracle[name], plain[name]) for name in ours})
    for name in draws[0]:
        stacked = (torch.stack(t) for t in zip(*(draw[name] for draw in draws), strict=True))
        assert_within_budget(*stacked, name)


@kinds
def test_streams_are_those_of_single_projections(kind):
    """Packed projection i is one projection under mask stream i, bit for bit."""
    t = tensors("packed", torch.float32)
    weights = quantised(t, kind)
    together = call("packed", t, weights, dropout_p=0.5, seed=SEED)
    for i, y in enumerate(together):
        w = weights[i]
        base, meta = ([w], list(w.shape)) if isinstance(w, torch.Tensor) else (w.base, w.meta)
        alone, _ = torch.ops.lora_kernels.lora_linear_fwd(
            t["x"],
            base,
            meta,
            t[f"a{i}"],
            t[f"b{i}"],
            scales()[i],
            t.get(f"bias{i}"),
            0.5,
            SEED,
            None,
            None,
            i,
        )
        assert torch.equal(y, alone)
        mask = F.dropout_mask((M, K), 0.5, SEED, i)
        zero = {**t, f"w{i}": torch.zeros_like(t[f"w{i}"])}
        unit = F.lora_linear(t["x"] * mask * 2, zero[f"w{i}"], t[f"a{i}"], t[f"b{i}"])
        again = F.lora_packed_linear(
            t["x"],
            [torch.zeros_like(dense(v, torch.float32)) for v in weights],
            [t[f"a{j}"] for j in range(3)],
            [t[f"b{j}"] for j in range(3)],
            scales=[1.0] * 3,
            dropout_p=0.5,
            seed=SEED,
        )[i]
        assert_within_budget(again, unit.double(), unit)


def _saved(run):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


@kinds
@layers
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_saved_bytes(layer, kind, p):
    """x once, one s, for the MLP g, u and down's s besides, and parameters."""
    t = tensors(layer, torch.float32)
    weights = quantised(t, kind)
    base = [v for w in weights for v in ([w] if isinstance(w, torch.Tensor) else w.base)]
    kept = _saved(lambda: call(layer, t, weights, dropout_p=p, seed=SEED))
    assert sum(v.data_ptr() == t["x"].data_ptr() for v in kept) == 1
    known = {v.data_ptr() for v in (*t.values(), *base, SEED)}
    extra = [v for v in kept if v.data_ptr() not in known]
    sizes, ranks, _ = LAYERS[layer]
    rows = [sum(ranks)] if layer == "packed" else [sum(ranks[:2]), ranks[2], *[sizes[0][0]] * 2]
    assert sorted(v.nbytes for v in extra) == sorted(4 * M * columns for columns in rows)
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in extra)


@pytest.fixture
def spy(monkeypatch):
    """The flags that the backward ops were given, on the reference."""
    calls = []
    for name in ("lora_linear_bwd", "lora_packed_bwd", "glu_bwd"):
        implementations = ops()[name].implementations
        original = implementations["reference"]

        def record(call, name=name, original=original):
            calls.append((name, call))
            return original.fn(call)

        monkeypatch.setitem(
            implementations, "reference", Implementation("reference", record, original.supports)
        )
    with use_backend("reference"):
        yield calls


ASKED = ["x", "a0", "b1", "bias2", "w1", "a2", "b2", "w2", "a1+b2", "x+a2", "b2+bias2"]


@pytest.mark.parametrize("asked", ASKED)
@layers
def test_only_what_requires_a_gradient_is_computed(layer, asked, spy):
    asked = asked.split("+")
    t = {n: v.detach() for n, v in tensors(layer, torch.float32).items()}
    weights = [t[f"w{i}"] for i in range(3)]
    for name in asked:
        t[name].requires_grad_()
    options = {"dropout_p": 0.2, "seed": SEED}
    total(call(layer, t, weights, **options)).backward()
    assert {n for n, v in t.items() if v.grad is not None} == set(asked)
    in_order = ["x"] + [f"{kind}{i}" for kind in ("a", "b", "bias", "w") for i in range(3)]
    if layer == "packed":
        ((_, args),) = spy
        assert list(args[-1]) == [n in asked for n in in_order]
    else:
        into = [n for n in in_order if not n.endswith("2")]
        packed = [args for name, args in spy if name == "lora_packed_bwd"]
        assert len(packed) == any(n in asked for n in into)
        for args in packed:
            assert list(args[-1]) == [n in asked for n in into]
        need_h = "a2" in asked or "w2" in asked
        glu = [args[-1] for name, args in spy if name == "glu_bwd"]
        assert glu == [need_h] * len(packed)
        # Of down, nothing is computed twice.
        of_down = [args[12] for name, args in spy if name == "lora_linear_bwd"]
        assert [sum(flags) for flags in zip(*of_down, strict=True)] == [
            int(bool(packed)),
            *(int(n in asked) for n in ("a2", "b2", "bias2")),
            0,
            0,
            int("w2" in asked),
        ]
    alone = {n: v.grad for n, v in t.items() if v.grad is not None}
    everything = {n: v.detach().requires_grad_() for n, v in t.items()}
    total(call(layer, everything, [everything[f"w{i}"] for i in range(3)], **options)).backward()
    for name, grad in alone.items():
        assert torch.equal(everything[name].grad, grad), name


@layers
def test_nothing_requires_a_gradient(layer):
    t = tensors(layer, torch.float32, grad=False)
    weights = quantised(t, "mixed")
    y = as_tuple(call(layer, t, weights))
    assert not any(v.requires_grad for v in y)
    with torch.inference_mode():
        assert all(map(torch.equal, as_tuple(call(layer, t, weights)), y))
    t["x"].requires_grad_()
    with torch.no_grad():
        assert not any(v.requires_grad for v in as_tuple(call(layer, t, weights)))


@layers
def test_double_backward_raises(layer):
    t = tensors(layer, torch.float32)
    y = call(layer, t, quantised(t, "dense"))
    (dx,) = torch.autograd.grad(total(y).square(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_an_unused_projection_costs_no_gradient():
    t = tensors("packed", torch.float32)
    q, _, _ = call("packed", t, quantised(t, "dense"))
    q.sum().backward()
    assert not t["a1"].grad.any() and not t["w2"].grad.any() and t["a0"].grad.any()


@kinds
@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_but_the_adapters(layer, kind, dtype):
    auto = tensors(layer, torch.float32)
    cast = {n: v.detach().requires_grad_() for n, v in auto.items()}
    weights = quantised(auto, kind)
    options = {"dropout_p": 0.2, "seed": SEED}
    with torch.autocast("cpu", dtype):
        y = call(layer, auto, weights, **options)
    low = {n: v if n[0] in "ab" and n[:4] != "bias" else v.to(dtype) for n, v in cast.items()}
    low_weights = [
        low[f"w{i}"] if isinstance(w, torch.Tensor) else w for i, w in enumerate(weights)
    ]
    z = call(layer, low, low_weights, **options)
    for got, want in zip(as_tuple(y), as_tuple(z), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)
    total(y).backward()
    total(z).backward()
    for name in differentiable(auto, kind):
        assert auto[name].grad.dtype == torch.float32
        assert torch.equal(auto[name].grad, cast[name].grad), name


def _call(layer, t, weights):
    return call(layer, t, weights, dropout_p=0.3)


def _step(layer, kind, t, weights, lead, fn=_call):
    torch.manual_seed(11)
    given = t | {"x": torch.linspace(-1, 1, lead * K).view(lead, K).to(t["x"].dtype)}
    given["x"].requires_grad_()
    y = fn(layer, given, weights)
    grads = torch.autograd.grad(total(y), [given[n] for n in differentiable(t, kind)])
    return [*(v.detach() for v in as_tuple(y)), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@kinds
@layers
def test_fullgraph_with_a_dynamic_batch(layer, kind, dtype):
    """One graph for every batch size, the same bits as eager, forward and backward."""
    t = tensors(layer, dtype, torch.float32)
    weights = quantised(t, kind)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_call, backend=counter, fullgraph=True, dynamic=True)
    for batch in (37, 51, 43, 71):  # no other tensor's size
        expected = _step(layer, kind, t, weights, batch)
        actual = _step(layer, kind, t, weights, batch, compiled)
        assert all(map(torch.equal, expected, actual))
    assert counter.frame_count == 1


@pytest.mark.slow
@layers
def test_inductor(layer):
    t = tensors(layer, torch.float32)
    weights = quantised(t, "mixed")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    options = {"dropout_p": 0.3, "seed": SEED}
    for rows in (5, 8):
        t["x"] = torch.randn(rows, K, requires_grad=True)
        y, z = call(layer, t, weights, **options), compiled(layer, t, weights, **options)
        names = differentiable(t, "mixed")
        expected, actual = (torch.autograd.grad(total(v), [t[n] for n in names]) for v in (y, z))
        for got, want in zip((*as_tuple(z), *actual), (*as_tuple(y), *expected), strict=True):
            assert_within_budget(got.detach(), want.detach().double(), want.detach())


@pytest.mark.parametrize("use_reentrant", [True, False])
@layers
def test_checkpoint_with_dropout(layer, use_reentrant):
    """The recomputation draws the seed of the first run again."""
    results = []
    for run in (lambda fn, x: fn(x), lambda fn, x: checkpoint(fn, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        t = tensors(layer, torch.float32)
        weights = quantised(t, "mixed")
        torch.manual_seed(21)
        y = run(lambda x, t=t, w=weights: call(layer, {**t, "x": x}, w, dropout_p=0.4), t["x"])
        torch.manual_seed(99)  # whatever runs between forward and backward
        total(y).backward()
        results.append([*as_tuple(y), *(t[n].grad for n in differentiable(t, "mixed"))])
    assert all(map(torch.equal, *results))


@layers
def test_seeds_follow_the_default_generator(layer):
    t = tensors(layer, torch.float32)
    weights = quantised(t, "dense")
    torch.manual_seed(8)
    first, second = (as_tuple(call(layer, t, weights, dropout_p=0.5)) for _ in range(2))
    torch.manual_seed(8)
    assert all(map(torch.equal, first, as_tuple(call(layer, t, weights, dropout_p=0.5))))
    assert not torch.equal(first[0], second[0])
    before = torch.get_rng_state()
    call(layer, t, weights, dropout_p=0.5, seed=SEED)
    call(layer, t, weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_native_kernels_say_which_projection_they_refuse():
    t = tensors("packed", torch.float32, grad=False)
    weights = quantised(t, "dense")
    weights[1] = weights[1].T.contiguous().T
    (explanation,) = explain(lambda: call("packed", t, weights))
    if explanation.refusals["native"] is not None and "extension" in explanation.refusals["native"]:
        pytest.skip(explanation.refusals["native"])
    assert explanation.refusals["native"] == (
        "projection 1: takes parameters whose last dimension is contiguous"
    )
