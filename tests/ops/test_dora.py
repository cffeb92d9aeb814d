"""DoRA through the public functions: derivatives, PEFT's results, rows without a norm, what is
saved, autocast, compile, checkpointing, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch import Implementation, ops
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.dora import dora_norm
from lora_kernels.testing import assert_within_budget
from tests.ops.dora_calls import (
    NAMES,
    SCALE,
    SEED,
    K,
    M,
    N,
    R,
    call,
    double,
    quantized,
    require,
    tensors,
)
from tools.op_inputs.source import DTYPES

# --- derivatives ----------------------------------------------------------------------------------


@pytest.fixture
def fixed_norm(monkeypatch):
    """The norm of the first call, for every call: the gradient takes it for a constant."""
    implementations = ops()["dora_norm"].implementations
    original, kept = implementations["reference"], []

    def norm(call):
        kept.append(original.fn(call))
        return kept[0].clone()

    replaced = Implementation("reference", norm, original.supports)
    monkeypatch.setitem(implementations, "reference", replaced)
    with use_backend("reference"):
        yield


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ["", "zero", "flat"])
def test_gradcheck(fixed_norm, p, bias, rows):
    t = double(tensors(4, 5, 7, 2))
    if rows == "zero":
        t["weight"][1], t["lora_b"][1] = 0, 0
    if rows == "flat":
        t["magnitude"][2] = 0
    t = require(t)
    if not bias:
        del t["bias"]
    asked = [name for name in NAMES if name in t]

    def run(*values):
        given = dict(zip(asked, values, strict=True))
        if rows == "zero":  # its magnitude has no derivative: the row is plain LoRA's
            given["magnitude"] = given["magnitude"] * torch.tensor([1, 0, 1, 1, 1]).double()
        return call(given, dropout_p=p, seed=SEED)

    assert torch.autograd.gradcheck(run, [t[name] for name in asked])


def test_gradients_are_the_same_one_at_a_time():
    t = tensors()
    for p in (0.0, 0.3):
        together = require(t)
        call(together, dropout_p=p, seed=SEED).square().sum().backward()
        for name in NAMES:
            alone = require(t, (name,))
            call(alone, dropout_p=p, seed=SEED).square().sum().backward()
            assert torch.equal(alone[name].grad, together[name].grad), name
            assert all(v.grad is None for k, v in alone.items() if k != name)


def test_nothing_requires_a_gradient():
    t = tensors()
    y = call(t)
    assert y.grad_fn is None
    with torch.no_grad():
        assert torch.equal(call(require(t)), y)
    with torch.inference_mode():
        assert torch.equal(call(t), y)


def test_double_backward_raises():
    t = require(tensors())
    (dx,) = torch.autograd.grad(call(t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- PEFT -----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """PEFT's dropout, with our mask."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        kept = round(65536 * (1 - self.p)) / 65536
        return x * F.dropout_mask(x.shape, self.p, SEED) / kept


def _peft(t, weight, p, bias, dtype):
    """Output and gradients of PEFT's layer, all given tensors converted to `dtype`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    r = t["lora_a"].shape[0]
    config = LoraConfig(r=r, lora_alpha=SCALE * r, use_dora=True, target_modules=["0"])
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias:
            linear.bias.copy_(t["bias"])
        layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]
        layer.lora_A["default"].weight.copy_(t["lora_a"])
        layer.lora_B["default"].weight.copy_(t["lora_b"])
        layer.lora_magnitude_vector["default"].weight.copy_(t["magnitude"])
    if p:
        layer.lora_dropout["default"] = Masked(p)
    layer = layer.to(dtype).train()
    x = t["x"].detach().to(dtype).requires_grad_()
    y = layer(x)
    leaves = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    leaves.append(layer.lora_magnitude_vector["default"].weight)
    return [y.detach(), *torch.autograd.grad(y, leaves, t["dy"].to(dtype))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("base", ["dense", "nf4-nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(7, 20, 31, 1), (33, 48, 100, 3), (65, 33, 128, 16)], ids=str)
def test_pefts_layer(size, dtype, base, p, bias):
    # With fp32 adapters PEFT computes all in fp32; in one dtype both do the same.
    t = tensors(*size, dtype=dtype)
    t["dy"] = torch.randn(size[0], size[1]).to(dtype)
    weight = quantized(t["weight"], base)
    # PEFT dequantises to the weight's own dtype, and so does a layer of x's dtype.
    dense = weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight
    theirs = _peft(t, dense, p, bias, dtype)
    exact = _peft(t, dense, p, bias, torch.float64)
    leaves = require(t, NAMES[:4])
    x, a, b, m = (leaves[name] for name in NAMES[:4])
    y = F.dora_linear(
        *(x, weight, a, b, m),
        **{"scale": SCALE, "bias": t["bias"] if bias else None, "dropout_p": p, "seed": SEED},
    )
    ours = [y.detach(), *torch.autograd.grad(y, [x, a, b, m], t["dy"])]
    for name, *results in zip(("y", *NAMES[:4]), ours, exact, theirs, strict=True):
        assert_within_budget(*results, name)


# --- what is saved --------------------------------------------------------------------------------


def _extra(t, base, p, bias):
    """y and the tensors kept beside what was given, without the norm and the seed."""
    t = require(t)
    weight = quantized(t["weight"], base)
    kept = []
    names = ("x", "lora_a", "lora_b", "magnitude")
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        x, a, b, m = (t[k] for k in names)
        y = F.dora_linear(
            *(x, weight, a, b, m),
            **{"bias": t["bias"] if bias else None, "dropout_p": p, "seed": SEED if p else None},
        )
    given = [*t.values(), SEED, *(weight.base if base != "dense" else [])]
    known = {v.data_ptr() for v in given}
    extra = [v for v in kept if v.data_ptr() not in known]
    norms = [v for v in extra if v.shape == (N,)]
    assert len(norms) == 1
    return y, [v for v in extra if v is not norms[0]]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "bias"), [(0.0, False), (0.0, True), (0.2, False)])
def test_saved_are_s_and_u(base, dtype, p, bias):
    y, extra = _extra(tensors(dtype=dtype, adapters=torch.float32), base, p, bias)
    assert sorted(tuple(v.shape) for v in extra) == [(M, R), (M, N)]
    assert all(v.data_ptr() != y.data_ptr() for v in extra)
    assert sum(v.nbytes for v in extra) == (
        M * R * rank_dtype(dtype).itemsize + M * N * dtype.itemsize
    )


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_frozen_magnitude_saves_nothing_of_the_output(p):
    t = require(tensors(), ("x", "lora_a", "lora_b"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        call(t, dropout_p=p, seed=SEED)
    assert all(v.shape != (M, N) for v in kept)


# --- dropout, checkpointing, autocast, compile ----------------------------------------------------


def test_the_mask_is_lora_linears():
    """With W = 0, A = the identity and B = ones, what is dropped shows in s."""
    seed = torch.tensor([5])
    x, eye, ones = torch.ones(M, K), torch.eye(K), torch.ones(N, K)
    mask = F.dropout_mask((M, K), 0.5, seed)
    kept = mask.sum(1, keepdim=True) * 2.0
    m = torch.full((N,), math.sqrt(K))  # the norm of a row of ones
    y = F.dora_linear(x, torch.zeros(N, K), eye, ones, m, dropout_p=0.5, seed=seed)
    assert torch.equal(y, kept.expand(M, N))


def test_seeds_follow_the_default_generator():
    t = tensors()
    torch.manual_seed(8)
    first, second = (call(t, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(8)
    assert torch.equal(call(t, dropout_p=0.5), first) and not torch.equal(first, second)
    assert torch.equal(call(t, seed=SEED), call(t))  # without dropout it is ignored


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpoint(base, p, use_reentrant):
    back = torch.randn(N, K)
    values = tensors()

    def grads(run):
        t = require(values, NAMES[:5])
        torch.manual_seed(21)
        x = run(lambda x: call({**t, "x": x}, base, dropout_p=p) @ back, t["x"])
        y = run(lambda x: call({**t, "x": x}, base, dropout_p=p), x)
        torch.manual_seed(99)  # whatever runs between forward and backward
        y.sum().backward()
        return [y.detach(), *(t[name].grad for name in NAMES[:5])]

    expected = grads(lambda fn, x: fn(x))
    actual = grads(lambda fn, x: checkpoint(fn, x, use_reentrant=use_reentrant))
    for want, got in zip(expected, actual, strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_weight_and_bias_alone(base, dtype):
    values = tensors()
    w_sq = F.weight_norm_squared(quantized(values["weight"], base))
    auto, cast = require(values), require(values)
    with torch.autocast("cpu", dtype):
        y = call(auto, base, dropout_p=0.2, seed=SEED)
        y.float().square().sum().backward()
    low = {k: v.to(dtype) if k in ("x", "bias") else v for k, v in cast.items()}
    if base == "dense":
        # The norm is the stored weight's, not the cast one's.
        norm = dora_norm(cast["weight"], cast["lora_a"], cast["lora_b"], scale=SCALE)
        low["weight"] = cast["weight"].to(dtype)
        other = dora_norm(low["weight"], cast["lora_a"], cast["lora_b"], scale=SCALE)
        low["magnitude"] = cast["magnitude"] * (other / norm)
        z = call(low, base, dropout_p=0.2, seed=SEED).detach()
        exact = call(double(low), base, dropout_p=0.2, seed=SEED).detach()
        assert_within_budget(y.detach(), exact, z)
    else:
        z = call(low, base, dropout_p=0.2, seed=SEED, weight_norm_sq=w_sq)
        assert torch.equal(y, z)
        z.float().square().sum().backward()
        for name in NAMES[:5]:
            assert torch.equal(auto[name].grad, cast[name].grad), name
    assert y.dtype == dtype
    assert all(auto[name].grad.dtype == torch.float32 for name in NAMES[:5])


@pytest.mark.parametrize("base", ["dense", "nf4-nested"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_fullgraph_with_a_dynamic_batch(base, p, bias):
    t = require(tensors(adapters=torch.float32, dtype=torch.bfloat16), NAMES[1:5])
    t["weight"] = quantized(t["weight"], base)
    t["bias"] = t["bias"] if bias else None
    used = [t[name] for name in NAMES[1:5] if t[name] is not None]

    def run(x, t):
        factors = (t["lora_a"], t["lora_b"], t["magnitude"])
        return F.dora_linear(x, t["weight"], *factors, scale=0.5, bias=t["bias"], dropout_p=p)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch in (5, 3, 8, 64):
        x = torch.randn(batch, 2, K).bfloat16().requires_grad_()
        results = []
        for fn in (run, compiled):
            torch.manual_seed(11)
            y = fn(x, t)
            results.append([y.detach(), *torch.autograd.grad(y, [x, *used], torch.ones_like(y))])
        for want, got in zip(*results, strict=True):
            assert torch.equal(want, got)
        counts.append(counter.frame_count)
    # torch traces twice at first, to make a constant of the float p; then no batch size compiles.
    assert counts == [counts[0]] * 4


@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 0, K), (2, 3, 4, K)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_any_leading_dimensions(shape, p):
    t = require(tensors())
    x = torch.randn(shape, requires_grad=True)
    y = call({**t, "x": x}, dropout_p=p, seed=SEED)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    flat = require(t)
    rows = x.detach().reshape(-1, K).requires_grad_()
    z = call({**flat, "x": rows}, dropout_p=p, seed=SEED)
    z.sum().backward()
    assert torch.equal(y.reshape(-1, N), z)
    assert torch.equal(x.grad.reshape(-1, K), rows.grad)
    assert torch.equal(t["magnitude"].grad, flat["magnitude"].grad)


# --- bad input ------------------------------------------------------------------------------------


BF16, I64 = torch.bfloat16, torch.int64
BAD = [
    ("x", torch.ones(()), ValueError, r"got shape \[\], expected \[\.\.\., 16\]"),
    ("x", torch.ones(M, K, dtype=I64), TypeError, "got dtype int64"),
    ("weight", torch.ones(K), ValueError, r"got shape \[16\], expected \[N, K\]"),
    ("weight", torch.ones(N, K, dtype=BF16), TypeError, "got dtype bfloat16, expected float32"),
    ("weight", torch.ones(N, K, dtype=torch.int8), TypeError, "got dtype int8"),
    ("lora_a", torch.ones(R, K + 1), ValueError, r"got shape \[3, 17\], expected \[r, 16\]"),
    ("lora_b", torch.ones(N, R + 1), ValueError, r"got shape \[10, 4\], expected \[10, 3\]"),
    ("lora_b", torch.ones(N, R, dtype=BF16), TypeError, "got dtype .*bfloat16, expected .*float32"),
    ("magnitude", torch.ones(N, 1), ValueError, r"got shape \[10, 1\], expected \[10\]"),
    ("magnitude", torch.ones(N, dtype=I64), TypeError, "got dtype int64, expected float32"),
    ("magnitude", torch.ones(N, device="meta"), ValueError, "is on meta, expected cpu"),
    ("bias", torch.ones(N, dtype=BF16), TypeError, "got dtype bfloat16, expected float32"),
    ("dropout_p", 1.0, ValueError, "got 1.0"),
    ("seed", torch.ones(2, dtype=I64), ValueError, r"got shape \[2\], expected \[1\]"),
    ("weight_norm_sq", torch.ones(N + 1), ValueError, r"got shape \[11\], expected \[10\]"),
    ("weight_norm_sq", torch.ones(N, dtype=BF16), TypeError, "got dtype .*, expected float32"),
    ("weight_norm_sq", torch.ones(N, device="meta"), ValueError, "is on meta, expected cpu"),
]


@pytest.mark.parametrize(("name", "value", "error", "says"), BAD)
def test_bad_input(name, value, error, says):
    t = tensors()
    options = {"dropout_p": 0.1}
    with pytest.raises(error, match=f"^{name}: {says}"):
        call({**t, **options, name: value})


def test_a_bad_quantised_weight():
    t = tensors()
    packed = torch.zeros(3, dtype=torch.uint8)
    bad = copy.copy(quantized(t["weight"], "nf4")).with_tensors({"packed": packed})
    with pytest.raises(ValueError, match=r"^qweight\.packed: got shape \[3\]"):
        F.dora_linear(t["x"], bad, t["lora_a"], t["lora_b"], t["magnitude"])
    with pytest.raises(ValueError, match=r"^weight: got shape \[2, 3, 4\]"):
        F.weight_norm_squared(torch.ones(2, 3, 4))
