"""A small attention with adapters, alone and fused, and what the tests ask of it."""

from __future__ import annotations

import torch

import lora_kernels as lk
from tests.adapters.models import Attention, wake

K = 40
PACKED, LONE = "lora_packed_fwd", "lora_linear_fwd"


def attention(quantize=None, dtype=torch.float32, dropout=0.0, **options):
    torch.manual_seed(0)
    model = Attention().to(dtype)
    options = {"rank_pattern": {"k": 3}, "alpha_pattern": {"v": 5}} | options
    lk.apply_lora(model, 4, 8, dropout=dropout, quantize=quantize, exclude_modules=(), **options)
    return wake(model)


def pair(**options):
    """The same module twice, the second fused."""
    fused = attention(**options)
    lk.fuse_projections(fused)
    return attention(**options), fused


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def ran(fn):
    return [e.op for e in lk.explain(fn) if e.op in (PACKED, LONE)]


def step(model, x, seed=0, forward=None):
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    y = model(x) if forward is None else forward(x)
    y.float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
