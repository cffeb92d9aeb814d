"""What the autograd functions promise: only the gradients asked for, only x and s kept, autocast,
checkpointing, seeds."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch import Implementation, ops

M, N, K, R = 6, 10, 16, 3
NAMES = ("x", "lora_a", "lora_b", "bias", "rank_diag", "out_diag", "weight")
BASES = ("dense", "nf4")


@pytest.fixture
def tensors():
    sizes = {"x": (M, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,)}
    sizes |= {"rank_diag": (R,), "out_diag": (N,), "weight": (N, K)}
    return {name: torch.randn(sizes[name]) for name in NAMES}


def _call(t, base="dense", **options):
    t = dict(t)
    weight = t.pop("weight")
    x, a, b = (t.pop(k) for k in ("x", "lora_a", "lora_b"))
    if base == "dense":
        return F.lora_linear(x, weight, a, b, **t, **options)
    return F.nf4_lora_linear(x, NF4Weight.quantize(weight.detach()), a, b, **t, **options)


def _require(t, names):
    return {k: v.detach().requires_grad_(k in names) for k, v in t.items()}


@pytest.fixture
def spy(monkeypatch):
    """Records the arguments of every backward op, on the reference."""
    calls = []
    for name in ("lora_linear_bwd", "nf4_linear_bwd"):
        implementations = ops()[name].implementations
        original = implementations["reference"]

        def record(call, name=name, original=original):
            calls.append((name, call))
            return original.fn(call)

        replaced = Implementation("reference", record, original.supports)
        monkeypatch.setitem(implementations, "reference", replaced)
    with use_backend("reference"):
        yield calls


ASKED = [(n,) for n in NAMES] + [("lora_a", "lora_b"), ("x", "lora_a", "lora_b"), NAMES]


# A 4-bit weight is frozen, so asking for its gradient alone is no case.
@pytest.mark.parametrize(
    ("base", "asked"),
    [(b, a) for b in BASES for a in ASKED if (b, a) != ("nf4", ("weight",))],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_only_what_requires_a_gradient_is_asked_of_the_op(tensors, spy, base, asked):
    t = _require(tensors, asked)
    _call(t, base, dropout_p=0.2).sum().backward()
    ((_, args),) = spy
    expected = [k in asked for k in NAMES]
    if base == "nf4":
        expected[-1] = False
    assert list(args.needs) == expected
    for name, value in t.items():
        has = name in asked and not (base == "nf4" and name == "weight")
        assert (value.grad is not None) == has, name


def test_gradients_are_the_same_one_at_a_time(tensors):
    seed = torch.tensor([5])
    together = _require(tensors, NAMES)
    _call(together, dropout_p=0.3, seed=seed).sum().backward()
    for name in NAMES:
        alone = _require(tensors, (name,))
        _call(alone, dropout_p=0.3, seed=seed).sum().backward()
        assert torch.equal(alone[name].grad, together[name].grad), name


def test_nothing_requires_a_gradient(tensors):
    y = _call(tensors)
    assert not y.requires_grad and y.grad_fn is None
    with torch.no_grad():
        assert not _call(_require(tensors, NAMES)).requires_grad
    with torch.inference_mode():
        assert torch.equal(_call(tensors), y)
    assert torch.equal(_call(tensors), y)


def test_nf4_linear_backward_runs_for_x_alone(tensors, spy):
    q = NF4Weight.quantize(tensors["weight"])
    bias = tensors["bias"].requires_grad_()
    F.nf4_linear(tensors["x"], q, bias=bias).sum().backward()
    assert spy == [] and torch.equal(bias.grad, torch.full((N,), float(M)))
    F.nf4_linear(tensors["x"].requires_grad_(), q).sum().backward()
    assert [name for name, _ in spy] == ["nf4_linear_bwd"]


def _saved(call):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    return y, kept


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_saved_are_x_and_s_besides_the_parameters(tensors, base, p):
    t = _require(tensors, NAMES)
    qweight = NF4Weight.quantize(tensors["weight"])
    names = ("bias", "rank_diag", "out_diag")
    rest = {k: t[k] for k in names} | {"dropout_p": p, "seed": torch.tensor([1]) if p else None}
    if base == "dense":
        call = lambda: F.lora_linear(t["x"], t["weight"], t["lora_a"], t["lora_b"], **rest)  # noqa: E731
    else:
        call = lambda: F.nf4_lora_linear(t["x"], qweight, t["lora_a"], t["lora_b"], **rest)  # noqa: E731
    _, kept = _saved(call)
    given = [*t.values(), *qweight.base, rest["seed"]]
    known = {v.data_ptr() for v in given if v is not None}
    assert any(v.data_ptr() == t["x"].data_ptr() for v in kept)
    extra = [v for v in kept if v.data_ptr() not in known]
    assert [tuple(v.shape) for v in extra] == [(M, R)]


def test_nf4_linear_saves_the_weight_alone(tensors):
    q = NF4Weight.quantize(tensors["weight"])
    _, kept = _saved(lambda: F.nf4_linear(tensors["x"].requires_grad_(), q, bias=tensors["bias"]))
    assert {v.data_ptr() for v in kept} == {v.data_ptr() for v in q.base}


@pytest.mark.parametrize("base", BASES)
def test_double_backward_raises(tensors, base):
    t = _require(tensors, NAMES)
    y = _call(t, base)
    (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_overwriting_x_before_the_backward_raises(tensors):
    leaf = tensors["x"].requires_grad_()
    x = leaf * 1
    y = _call({**_require(tensors, ("lora_a",)), "x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_weight_and_bias_but_not_the_adapters(tensors, base, dtype):
    seed = torch.tensor([3])
    auto, cast = _require(tensors, NAMES), _require(tensors, NAMES)
    with torch.autocast("cpu", dtype):
        y = _call(auto, base, dropout_p=0.2, seed=seed)
    low = {k: v.to(dtype) if k in ("x", "weight", "bias") else v for k, v in cast.items()}
    if base == "nf4":
        low["weight"] = cast["weight"]
    z = _call(low, base, dropout_p=0.2, seed=seed)
    assert y.dtype == dtype and torch.equal(y, z)
    y.float().sum().backward()
    z.float().sum().backward()
    for name in NAMES[: 6 if base == "nf4" else 7]:
        assert auto[name].grad.dtype == torch.float32
        assert torch.equal(auto[name].grad, cast[name].grad), name


@pytest.mark.parametrize("base", BASES)
def test_autocast_makes_no_16_bit_copy_of_the_adapters(tensors, spy, base):
    t = _require(tensors, NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        y = _call(t, base)
    y.sum().backward()
    ((_, (dy, x, s, _, _, a, b, *_)),) = spy
    assert {v.dtype for v in (dy, x, s)} == {torch.bfloat16}
    assert {v.dtype for v in (a, b)} == {torch.float32}
    assert a.data_ptr() == t["lora_a"].data_ptr()


def test_autocast_nf4_linear(tensors):
    q = NF4Weight.quantize(tensors["weight"])
    x = tensors["x"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.nf4_linear(x, q, bias=tensors["bias"])
        with torch.autocast("cpu", enabled=False):
            assert F.nf4_linear(x, q).dtype == torch.float32
    expected = F.nf4_linear(x.bfloat16(), q, bias=tensors["bias"].bfloat16())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(tensors):
    t = {k: v.double() for k, v in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = _call(t)
    assert y.dtype == torch.float64 and torch.equal(y, _call(t))


# --- checkpointing and seeds ----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_checkpoint_with_dropout(tensors, base, use_reentrant):
    """Two dropout layers whose seeds come from the default generator: the recomputation must draw
    the same two."""
    back = torch.randn(K, N)

    def block(t, run):
        x = run(lambda x: _call({**t, "x": x}, base, dropout_p=0.4) @ back.T, t["x"])
        return run(lambda x: _call({**t, "x": x}, base, dropout_p=0.4), x)

    def grads(run):
        t = _require(tensors, NAMES)
        torch.manual_seed(21)
        y = block(t, run)
        torch.manual_seed(99)  # whatever runs between forward and backward
        y.sum().backward()
        return y.detach(), [v.grad for k, v in t.items() if not (base == "nf4" and k == "weight")]

    y, expected = grads(lambda fn, x: fn(x))
    z, actual = grads(lambda fn, x: checkpoint(fn, x, use_reentrant=use_reentrant))
    assert torch.equal(y, z)
    for want, got in zip(expected, actual, strict=True):
        assert torch.equal(want, got)


def test_seeds_follow_the_default_generator(tensors):
    torch.manual_seed(8)
    first, second = (_call(tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(8)
    assert torch.equal(_call(tensors, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5, "seed": torch.tensor([1])}], ids=str)
def test_the_generator_is_not_touched_without_need(tensors, options):
    before = torch.get_rng_state()
    _call(tensors, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_is_ignored_without_dropout(tensors):
    assert torch.equal(_call(tensors, seed=torch.tensor([1])), _call(tensors))


def test_evaluation_between_training_steps_changes_nothing(tensors):
    """bitsandbytes on a CPU loses gradients after one evaluation."""
    q = NF4Weight.quantize(tensors["weight"])

    def step():
        t = _require(tensors, ("x", "lora_a"))
        F.nf4_lora_linear(t["x"], q, t["lora_a"], t["lora_b"]).sum().backward()
        return t["x"].grad, t["lora_a"].grad

    before = step()
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            F.nf4_lora_linear(tensors["x"], q, tensors["lora_a"], tensors["lora_b"])
        for want, got in zip(before, step(), strict=True):
            assert torch.equal(want, got)
