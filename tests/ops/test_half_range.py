"""fp16 beyond 65504: what is between two products may leave the range, what comes of it does not.

The ops on every backend are in `test_parity.py` and `tests/compiled` (`case.RANGES`); here are the
functions made of several ops, and the rounding that all of them share.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels import functional as F
from lora_kernels import use_backend
from lora_kernels.dispatch import BACKENDS, ops
from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.testing import assert_within_budget

HALF = torch.float16
LARGEST = torch.finfo(HALF).max
M, K, N, R = 9, 40, 24, 3


def _here(op: str) -> list[str]:
    """The backends that take plain fp16 calls on the CPU."""
    x = torch.ones(2, 8, dtype=HALF)
    call = ops()[op].call(x, [x], [2, 8], x, x[:, :2], 1.0, None, 0.0, None, None, None)
    found = ops()[op].implementations
    return [b for b in BACKENDS if b in found and found[b].supports(call) is None]


backends = pytest.mark.parametrize("backend", _here("lora_linear_fwd"))


def test_what_is_kept_has_the_bits_of_fp16_and_more_range():
    t = torch.randn(1000) * torch.logspace(-4, 4, 1000)
    normal = t.abs().clamp(max=LARGEST / 2) > torch.finfo(HALF).tiny
    assert torch.equal(rank_value(t, HALF)[normal], t.to(HALF).float()[normal])
    large = torch.tensor([65504.0, 65520.0, 2.0**20 + 2.0**8, -1e30, 1e-30])
    kept = rank_value(large, HALF)
    assert kept.dtype == rank_dtype(HALF) == torch.float32
    assert ((kept - large).abs() <= large.abs() * 2.0**-11).all() and (kept != 0).all()
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(rank_value(odd, HALF).nan_to_num(1.0), odd.nan_to_num(1.0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert rank_dtype(dtype) == dtype
        assert torch.equal(rank_value(t, dtype), t.to(dtype))


def _layer():
    """x, W, A, B with s of 2^18 and an output of hundreds; the merged weight is ordinary."""
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(M, K, generator=g) * 32, torch.randn(N, K, generator=g) / K**0.5
    a = torch.randn(R, K, generator=g) * (8192 / K**0.5)
    b = torch.randn(N, R, generator=g) * (2.0**-8 / R**0.5)
    return [t.to(HALF) for t in (x, w, a, b)]


@backends
def test_a_layer_is_what_its_merged_weight_is(backend):
    x, w, a, b = _layer()
    assert (x.float() @ a.float().T).abs().max() > LARGEST
    merged = (w.double() + b.double() @ a.double()).to(HALF)
    plain = torch.nn.functional.linear(x, merged)
    exact = x.double() @ (w.double() + b.double() @ a.double()).T
    with use_backend(backend):
        y = F.lora_linear(x, w, a, b)
    assert plain.isfinite().all()
    assert_within_budget(y, exact, plain)


@backends
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_mlp(backend, dropout_p):
    """The gate's and the up projection's s beyond fp16, then down's and its ds."""
    x, w, a, b = _layer()
    g = torch.Generator().manual_seed(4)
    down = torch.randn(K, N, generator=g) / N**0.5
    a_down = torch.randn(R, N, generator=g) * (1024 / N**0.5)
    b_down = torch.randn(K, R, generator=g) * (2.0**-12 / R**0.5)
    x, a, b = x / 4, a * 4, b / 64
    tensors = [x, w, w.flip(0), down, a, a.flip(1), a_down, b, b.flip(0), b_down]
    dy = (torch.randn(M, K, generator=g) * 2.0**-12).to(HALF)

    def run(dtype):
        t = [v.to(HALF).to(dtype).requires_grad_() for v in tensors]
        y = F.lora_mlp(
            *(t[0], t[1:4], t[4:7], t[7:10]),
            scales=[0.5, 1.0, 2.0],
            dropout_p=dropout_p,
            seed=torch.tensor([5]),
        )
        return [y.detach(), *torch.autograd.grad(y, t, dy.to(dtype))]

    with use_backend("reference"):
        exact, plain = run(torch.float64), run(HALF)
    with use_backend(backend):
        found = run(HALF)
    for got, want, beside in zip(found, exact, plain, strict=True):
        assert beside.isfinite().all()
        assert_within_budget(got, want, beside)


@backends
def test_the_losss_weight_gradient_is_a_mean(backend):
    """4,096 rows of one label: their sum is beyond fp16, what it is divided to is not."""
    x = torch.full((4096, 8), 40.0, dtype=HALF)
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(6)) / 64
    labels = torch.zeros(4096, dtype=torch.int64)

    def run(dtype):
        w = weight.to(HALF).to(dtype).requires_grad_()
        loss = F.linear_cross_entropy(x.to(dtype), w, labels)
        (dw,) = torch.autograd.grad(loss, w)
        return dw

    with use_backend("reference"):
        exact, plain = run(torch.float64), run(HALF)
    assert exact.abs().max() * 4096 > LARGEST
    if backend == "triton":  # has no kernel of the loss
        return
    with use_backend(backend):
        found = run(HALF)
    assert found.dtype == HALF
    assert_within_budget(found, exact, plain)
