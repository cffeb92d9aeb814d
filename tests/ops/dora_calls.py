"""Calls of `dora_linear` on an adapter that has trained a little."""

from __future__ import annotations

import math

import torch

from lora_kernels import NF4Weight
from lora_kernels import functional as F
from tools.op_inputs.source import BASES

M, N, K, R = 6, 10, 16, 3
SCALE = 0.75
NAMES = ("x", "lora_a", "lora_b", "magnitude", "bias", "weight")
SEED = torch.tensor([77])


def tensors(m=M, n=N, k=K, r=R, dtype=torch.float32, adapters=None):
    """Values of an adapter that has trained a little."""
    adapters = adapters or dtype
    t = {"x": torch.randn(m, k), "weight": torch.randn(n, k) / math.sqrt(k), "bias": torch.randn(n)}
    t = {name: v.to(dtype) for name, v in t.items()}
    t["lora_a"] = torch.randn(r, k).to(adapters) / math.sqrt(k)
    t["lora_b"] = (torch.randn(n, r) / math.sqrt(r)).to(adapters)
    norm = torch.linalg.vector_norm(t["weight"].double(), dim=1)
    t["magnitude"] = (norm * (1 + 0.25 * torch.randn(n))).to(adapters)
    return t


def quantized(weight, base):
    if BASES[base] is None:
        return weight
    return NF4Weight.quantize(weight.detach(), *BASES[base])


def call(t, base="dense", **options):
    t = dict(t)
    x, weight, a, b, m = (t.pop(k) for k in ("x", "weight", "lora_a", "lora_b", "magnitude"))
    return F.dora_linear(x, quantized(weight, base), a, b, m, scale=SCALE, **t, **options)


def require(t, names=NAMES):
    return {k: v.detach().clone().requires_grad_(k in names) for k, v in t.items()}


def double(t):
    return {k: v.double() for k, v in t.items()}
