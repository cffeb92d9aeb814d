"""Calls of the packed functions over named tensors, and the plain expressions they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as TF

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from tests.ops.variants import as_tuple

M, K = 6, 20
SEED = torch.tensor([987654321])
ACTS = {
    "silu": TF.silu,
    "gelu": TF.gelu,
    "gelu_tanh": lambda g: TF.gelu(g, approximate="tanh"),
}
# name -> (N_i, K_i), r_i, which projections have a bias
LAYERS = {
    "packed": (((64, K), (24, K), (8, K)), (1, 3, 16), (True, False, True)),
    "mlp": (((24, K), (24, K), (10, 24)), (2, 3, 1), (False, True, True)),
}
KINDS = ("dense", "nf4", "mixed")


def uniform(*shape, std=1.0):
    """Without a normal's tails, so that no single element makes the largest error by chance."""
    return (torch.rand(*shape, dtype=torch.float64) * 2 - 1) * (3**0.5 * std)


def tensors(layer, dtype=torch.float64, adapters=None, lead=(M,), grad=True):
    """x, w0, a0, b0, bias0, w1, ... of a layer."""
    t = {"x": uniform(*lead, K)}
    for i, ((n, k), r, has) in enumerate(zip(*LAYERS[layer], strict=True)):
        t[f"w{i}"] = uniform(n, k, std=k**-0.5)
        t[f"a{i}"] = uniform(r, k, std=k**-0.5)
        t[f"b{i}"] = uniform(n, r, std=0.5 * r**-0.5)
        if has:
            t[f"bias{i}"] = uniform(n)
    kinds = {"a": adapters or dtype, "b": adapters or dtype}
    return {
        name: v.to(dtype if name.startswith("bias") else kinds.get(name[0], dtype))
        .detach()
        .requires_grad_(grad)
        for name, v in t.items()
    }


def scales():
    """Literals: dynamo takes a float from elsewhere for an input, and compiles a first time."""
    return [0.7, -1.5, 2.0]


def is_dense(kind, i):
    return kind == "dense" or (kind == "mixed" and i == 1)


def differentiable(t, kind):
    """The names of what can have a gradient: a 4-bit weight cannot."""
    return [name for name in t if name[0] != "w" or is_dense(kind, int(name[1:]))]


def quantised(t, kind):
    """The weights as the kind says; nested scales for the last one."""
    with use_backend("reference"):
        return [
            t[f"w{i}"]
            if is_dense(kind, i)
            else NF4Weight.quantize(t[f"w{i}"].detach(), 32, double_quant=i == 2)
            for i in range(3)
        ]


def call(layer, t, weights, **options):
    """F.lora_packed_linear or F.lora_mlp on the tensors."""
    fn = F.lora_packed_linear if layer == "packed" else F.lora_mlp
    return fn(
        t["x"],
        weights,
        [t[f"a{i}"] for i in range(3)],
        [t[f"b{i}"] for i in range(3)],
        scales=scales(),
        biases=[t.get(f"bias{i}") for i in range(3)],
        **options,
    )


def total(y):
    """A scalar in which every element of every output weighs differently."""
    outputs = (y,) if isinstance(y, torch.Tensor) else y
    return sum((v * torch.linspace(-1, 2, v.numel()).view_as(v).to(v.dtype)).sum() for v in outputs)


def dense(w, dtype):
    return w if isinstance(w, torch.Tensor) else w.dequantize(dtype)


def projection(x, t, weights, i, p, seed):
    """Projection i as plain autograd operations."""
    dropped = x
    if p:
        mask = F.dropout_mask(x.shape, p, seed, i)
        dropped = x * mask.to(x.dtype) / (1 - round(65536 * p) / 65536)
    low = dropped @ t[f"a{i}"].to(x.dtype).T
    y = TF.linear(x, dense(weights[i], x.dtype), t.get(f"bias{i}"))
    return y + scales()[i] * (low @ t[f"b{i}"].to(x.dtype).T)


def textbook(layer, t, weights, dropout_p=0.0, seed=SEED, activation="silu"):
    x = t["x"]
    if layer == "packed":
        return tuple(projection(x, t, weights, i, dropout_p, seed) for i in range(3))
    gate, up = (projection(x, t, weights, i, dropout_p, seed) for i in range(2))
    return projection(ACTS[activation](gate) * up, t, weights, 2, dropout_p, seed)


def results(layer, t, kind, weights, dtype, fn, cast=lambda v: v, **options):
    """Outputs and gradients of `fn`, the inputs cast."""
    names = [n for n in t if n[0] != "w"] + [n for n in differentiable(t, kind) if n[0] == "w"]
    given = {n: cast(v.detach()).requires_grad_() for n, v in t.items()}
    now = [
        given[f"w{i}"] if isinstance(w, torch.Tensor) else cast(w.dequantize(dtype))
        for i, w in enumerate(weights)
    ]
    y = fn(layer, given, weights if fn is call and kind == "nf4" else now, **options)
    grads = torch.autograd.grad(total(y), [given[n] for n in names])
    return dict(zip(names, grads, strict=True)) | {
        f"y{i}": v.detach() for i, v in enumerate(as_tuple(y))
    }
