"""What LoRALinear and QLoRALinear have in common: forward, gradients, modes, compile."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels.dispatch import use_backend
from lora_kernels.functional import dropout_mask
from lora_kernels.nn import LoRALinear, QLoRALinear
from lora_kernels.testing import assert_call_within_budget, assert_within_budget
from tests.nn.layers import (
    KINDS,
    K,
    N,
    R,
    assert_checkpointing_repeats,
    dense_weight,
    make,
    plain,
    plain_args,
)

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (3, 5, K)])
def test_forward_is_the_plain_expression(kind, bias, dtype, shape):
    layer = make(kind, dtype, bias)
    x = torch.randn(shape, dtype=dtype)
    assert_call_within_budget(lambda x, *_: layer(x), plain, plain_args(layer, x))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_plain_expressions(kind, dtype):
    layer = make(kind, dtype)
    x = torch.randn(7, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(7, N, dtype=dtype)
    layer(x).backward(dy)
    grads = {}
    for name, cast in (("plain", lambda t: t), ("oracle", torch.Tensor.double)):
        args = [
            cast(t.detach()).requires_grad_() if isinstance(t, torch.Tensor) else t
            for t in plain_args(layer, x)
        ]
        plain(*args).backward(cast(dy))
        grads[name] = (args[0].grad, args[2].grad, args[3].grad)
    ours = (x.grad, layer.lora_A.grad, layer.lora_B.grad)
    for name, got, want, exact in zip("xAB", ours, grads["plain"], grads["oracle"], strict=True):
        assert got.dtype == want.dtype
        assert_within_budget(got, exact, want, f"d{name}")


@kinds
def test_adapters_are_fp32_over_a_16_bit_base(kind):
    assert make(kind, torch.bfloat16).lora_A.dtype == torch.float32
    assert make(kind, torch.float64).lora_B.dtype == torch.float64
    layer = make(kind, torch.bfloat16, adapter_dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16


@kinds
def test_only_the_adapter_trains(kind):
    layer = make(kind)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    layer(torch.randn(2, K)).sum().backward()
    assert layer.bias.grad is None
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None


@kinds
def test_only_asked_gradients_come(kind):
    layer = make(kind)
    layer.lora_B.requires_grad_(False)
    layer.bias.requires_grad_(True)
    x = torch.randn(2, K)
    layer(x).sum().backward()
    assert x.grad is None and layer.lora_B.grad is None
    assert layer.lora_A.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((N,), 2.0))


def test_a_dense_base_that_requires_grad_gets_its_own():
    layer = make("lora", torch.float64)
    layer.weight.requires_grad_(True)
    x = torch.randn(5, K, dtype=torch.float64)
    layer(x).sum().backward()
    assert_within_budget(layer.weight.grad, x.sum(0).expand(N, K), x.sum(0).expand(N, K))


@kinds
def test_a_new_adapter_changes_nothing(kind):
    linear = nn.Linear(K, N)
    layer = KINDS[kind].from_linear(linear, r=R)
    assert not layer.lora_B.any()
    x = torch.randn(3, K)
    # Adding zeros is exact where the base is computed apart from the branch.
    with torch.no_grad(), use_backend("reference"):
        assert torch.equal(layer(x), layer._base_forward(x))


@kinds
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale(kind, use_rslora):
    layer = make(kind, alpha=6, use_rslora=use_rslora)
    assert layer.scale == (6 / math.sqrt(R) if use_rslora else 6 / R)
    layer.alpha = 12
    assert layer.scale == (12 / math.sqrt(R) if use_rslora else 12 / R)


@kinds
def test_initialisation(kind):
    bound = math.sqrt(6 / ((1 + 5) * 4096))
    kaiming = KINDS[kind](4096, 8, r=16)
    assert kaiming.lora_A.abs().max() <= bound
    assert kaiming.lora_A.abs().max() > 0.99 * bound
    gaussian = KINDS[kind](4096, 8, r=16, init="gaussian")
    assert gaussian.lora_A.abs().max() > 2 / 16  # a normal has tails
    assert abs(gaussian.lora_A.std() * 16 - 1) < 0.05
    assert not gaussian.lora_B.any()


@kinds
def test_dropout_acts_in_training_only(kind):
    layer = make(kind, dropout=0.5)
    x = torch.randn(6, K)
    torch.manual_seed(3)
    train = layer(x)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    dropped = x * dropout_mask(x.shape, 0.5, seed) / 0.5
    w, a, b = dense_weight(layer, torch.float32), layer.lora_A, layer.lora_B

    def expected(x, dropped, w, a, b, bias):
        return x @ w.T + layer.scale * (dropped @ a.T @ b.T) + bias

    with torch.no_grad():
        assert_call_within_budget(
            lambda *_: train.detach(), expected, (x, dropped, w, a, b, layer.bias)
        )
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), train)


@kinds
def test_eval_and_train_in_any_order(kind):
    layer = make(kind)
    x = torch.randn(4, K)

    def gradient():
        layer.train()
        probe = x.clone().requires_grad_()
        layer.zero_grad()
        layer(probe).sum().backward()
        return probe.grad, layer.lora_A.grad

    before = gradient()
    layer.eval()
    with torch.no_grad():
        first = layer(x)
    after = gradient()
    layer.eval()
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    again = gradient()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))


@kinds
def test_autocast(kind):
    layer = make(kind)
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32
    bf16 = x.detach().bfloat16()
    assert_call_within_budget(lambda *_: y.detach(), plain, _cast_args(layer, bf16))


def _cast_args(layer, x):
    """Arguments of the plain expression as autocast leaves them."""
    _, w, a, b, bias, scale = plain_args(layer, x)
    return x, w, a, b, bias, scale


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout(kind, reentrant):
    assert_checkpointing_repeats(make(kind, dropout=0.3), reentrant)


def _compile_matches(layer, backend):
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 8, 5):
        x = torch.randn(rows, K, requires_grad=True)
        y = layer(x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        got = compiled(x)
        (gradient,) = torch.autograd.grad(got.sum(), x)
        assert_within_budget(got.detach(), y.detach().double(), y.detach())
        assert_within_budget(gradient, expected.double(), expected)


@kinds
@pytest.mark.parametrize("state", ["train", "eval", "merged", "disabled"])
def test_compile(kind, state):
    layer = make(kind).train(state == "train")
    if state == "merged":
        layer.merge()
    layer.adapter_enabled = state != "disabled"
    _compile_matches(layer, "aot_eager")


@kinds
def test_compile_with_dropout(kind):
    torch._dynamo.reset()
    layer = make(kind, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert layer.lora_A.grad.any()


@pytest.mark.slow
@kinds
def test_compile_with_inductor(kind):
    _compile_matches(make(kind), "inductor")


@kinds
def test_from_linear_on_meta_or_not(kind):
    linear = nn.Linear(K, N, device="meta")
    if kind == "lora":
        assert LoRALinear.from_linear(linear, r=R).lora_A.is_meta
    else:
        with pytest.raises(ValueError, match="meta device"):
            QLoRALinear.from_linear(linear, r=R)


@kinds
def test_from_linear_keeps_the_mode(kind):
    assert not KINDS[kind].from_linear(nn.Linear(K, N).eval()).training
    assert KINDS[kind].from_linear(nn.Linear(K, N)).training


@kinds
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"r": -3}, ValueError, "r: got -3"),
        ({"r": 2.0}, TypeError, "r: got 2.0"),
        ({"r": True}, TypeError, "r: got True"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan"),
        ({"alpha": math.inf}, ValueError, "alpha: got inf"),
        ({"alpha": "16"}, TypeError, "alpha: got '16'"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout: got -0.1"),
        ({"dropout": math.nan}, ValueError, "dropout: got nan"),
        ({"init": "zeros"}, ValueError, "init: got 'zeros'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got int8"),
    ],
)
def test_bad_options(kind, options, error, match):
    with pytest.raises(error, match=match):
        KINDS[kind].from_linear(nn.Linear(K, N), **options)
    with pytest.raises(error, match=match):
        KINDS[kind](K, N, **options)


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@kinds
def test_layers_that_are_no_plain_linear(kind):
    from_linear = KINDS[kind].from_linear
    with pytest.raises(TypeError, match="got Conv2d"):
        from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="forward of its own"):
        from_linear(_Doubling(4, 4))
    with pytest.raises(TypeError, match=r"LoRALinear.*forward of its own"):
        from_linear(LoRALinear(4, 4))
    with pytest.raises(TypeError, match="parametrised"):
        from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="got dtype float8_e4m3fn"):
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), False)
        from_linear(linear)
    with pytest.raises(ValueError, match=r"got shape \[0\]"):
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(torch.empty(0))
        from_linear(linear)


@kinds
def test_bad_input(kind):
    layer = make(kind)
    with pytest.raises((ValueError, RuntimeError), match="95"):
        layer(torch.randn(2, 95))
    for merged in (False, True):
        if merged:
            layer.eval().merge()
        with pytest.raises((TypeError, RuntimeError)):
            layer(torch.ones(2, K, dtype=torch.int64))


@kinds
def test_repr(kind):
    layer = make(kind, torch.bfloat16, dropout=0.25, use_rslora=True)
    for part in ("in_features=96", "out_features=48", "r=4", "alpha=32", "dropout=0.25"):
        assert part in repr(layer)
    assert "use_rslora=True" in repr(layer) and "adapter_dtype=float32" in repr(layer)
    assert "merged" not in repr(layer)
    layer.merge()
    assert "merged" in repr(layer)
