"""DoRA layers that have moved, and the plain PyTorch expression they stand for."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.testing import assert_within_budget
from tests.nn.layers import KINDS, K, N, R, dense_weight

MAGNITUDE = "lora_magnitude_vector"


def make(kind, dtype=torch.float32, bias=True, **options):
    """A layer [48, 96] of rank 4 whose B and magnitude have moved."""
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    layer = KINDS[kind].from_linear(linear, r=R, use_dora=True, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.lora_magnitude_vector.mul_(1 + 0.25 * torch.randn(N))
    return layer


def merged(w, a, b, m, scale):
    total = w + scale * (b @ a)
    return m[:, None] / torch.linalg.vector_norm(total, dim=1)[:, None] * total


def plain(x, w, a, b, m, bias, scale):
    total = merged(w.to(a.dtype), a, b, m, scale)
    return nn.functional.linear(x, total.to(x.dtype), bias)


def plain_args(layer, x):
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    w = dense_weight(layer, x.dtype)
    a, b, m = (p.detach() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    return x, w, a, b, m, bias, layer.scale


def norm_of(layer):
    w = dense_weight(layer, torch.float32) + layer.delta_weight()
    return w, torch.linalg.vector_norm(w.double(), dim=1)


def assert_magnitude_is_the_norm(layer):
    w, exact = norm_of(layer)
    magnitude = layer.lora_magnitude_vector.detach()
    plain = torch.linalg.vector_norm(w, dim=1).to(magnitude.dtype)
    assert_within_budget(magnitude, exact, plain)
