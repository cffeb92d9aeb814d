"""DoRA's norm: ‖W‖² in blocks, the factored form, and rows that have none."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import functional as F
from lora_kernels import use_backend
from lora_kernels.ops.dora import dora_norm, output_scale
from lora_kernels.ops.dora.magnitude import rows_at_once
from lora_kernels.testing import assert_within_budget
from tests.ops.dora_calls import (
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
from tools.op_inputs.source import BASES, DTYPES


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 0), (0, 8), (33, 31), (70, 4096), (700, 1000), (129, 6272)])
def test_weight_norm_squared(size, dtype, base):
    """Blocks of rows, of which the last two sizes have several."""
    w = torch.randn(size).to(dtype)
    weight = quantized(w, base)
    dense = w if base == "dense" else weight.dequantize(torch.float32)
    got = F.weight_norm_squared(weight)
    assert got.dtype == torch.float32
    exact = dense.double().square().sum(1)
    assert_within_budget(got, exact, dense.float().square().sum(1))


def test_blocks_are_several():
    assert 2 * rows_at_once(1000) < 700 and 3 * rows_at_once(6272) < 129


def test_weight_norm_squared_in_fp64():
    w = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(F.weight_norm_squared(w), w.square().sum(1))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_new_adapters_norm_is_that_of_the_weight(backend, base):
    weight = quantized(torch.randn(N, K), base)
    w_sq = F.weight_norm_squared(weight)
    with use_backend(backend):
        norm = dora_norm(weight, torch.randn(R, K), torch.zeros(N, R))
    assert_within_budget(norm, w_sq.double().sqrt(), w_sq.sqrt())


@pytest.mark.parametrize("base", BASES)
def test_rows_that_nearly_cancel(base):
    """Nothing is left but a hundred thousandth of W: the factored norm alone would see noise."""
    a, b = torch.randn(1, 64), torch.randn(9, 1)
    weight = quantized(-b @ a * (1 + 1e-5 * torch.randn(9, 64)), base)
    w = weight if base == "dense" else weight.dequantize(torch.float32)
    total = (w.double() + b.double() @ a.double()).square().sum(1).sqrt()
    plain = torch.linalg.vector_norm(w + b @ a, dim=1)
    assert_within_budget(dora_norm(weight, a, b), total, plain)


def test_the_norm_given_is_used():
    t = tensors()
    exact = F.weight_norm_squared(t["weight"])
    y = call(t)
    assert torch.equal(call(t, weight_norm_sq=exact), y)
    with use_backend("native"):
        assert not torch.equal(call(t, weight_norm_sq=4 * exact), y)


@pytest.mark.parametrize("base", ["dense", "nf4-nested"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_rows_without_a_norm_are_plain_lora(backend, dtype, p, base):
    """A layer of zeros: y and all gradients but the magnitude's are LoRA's, and it learns."""
    t = tensors(dtype=dtype)
    t["weight"], t["lora_b"] = torch.zeros_like(t["weight"]), torch.zeros_like(t["lora_b"])
    names = ("x", "lora_a", "lora_b", "bias")

    def run(fn, t, weight):
        t = require(t)
        x, a, b, bias = (t[k] for k in names)
        extra = (t["magnitude"],) if fn is F.dora_linear else ()
        y = fn(x, weight, a, b, *extra, bias=bias, scale=SCALE, dropout_p=p, seed=SEED)
        y.sum().backward()
        return t["magnitude"].grad, [y.detach(), *(t[k].grad for k in names)]

    with use_backend(backend):
        dmagnitude, ours = run(F.dora_linear, t, quantized(t["weight"], base))
    with use_backend("reference"):
        _, plain = run(F.lora_linear, t, t["weight"])
        _, exact = run(F.lora_linear, double(t), t["weight"].double())
    for name, *results in zip(("y", *names), ours, exact, plain, strict=True):
        assert_within_budget(*results, name)
    assert ours[3].any()
    assert torch.equal(dmagnitude, torch.zeros_like(t["magnitude"]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("value", [0.0, 1e-6, -0.0, -1e-3])
def test_a_magnitude_of_zero_gets_its_gradient(value, p, bias):
    t = tensors()
    t["magnitude"][3] = value
    if not bias:
        del t["bias"]
    dy = torch.randn(M, N)

    def gradient(t, backend):
        t = require(t)
        with use_backend(backend):
            call(t, dropout_p=p, seed=SEED).backward(dy.to(t["x"].dtype))
        return t["magnitude"].grad

    exact = gradient(double(t), "reference")
    assert_within_budget(gradient(t, "native"), exact, gradient(t, "reference"))
    assert gradient(t, "native")[3] != 0


def test_output_scale():
    norm = torch.tensor([2.0, 0.0, 4.0])
    scale = output_scale(torch.tensor([1.0, 5.0, -2.0], dtype=torch.bfloat16), norm)
    assert torch.equal(scale, torch.tensor([0.5, 1.0, -0.5]))
