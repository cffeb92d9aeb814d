"""The LoRA reference against numerical derivatives and against the textbook expression.

The textbook is the formula of `ops/lora/api.py` written with autograd's own operations and a mask
from `dropout_mask` (which `test_dropout.py` holds against the definition).
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from tools.op_inputs.source import BASES, DTYPES, strided

N, K, R = 5, 9, 3
SCALE = 0.7
SEED = torch.tensor([987654321])

# Which of (bias, rank_diag, out_diag) are there, and the dropout.
OPTIONS = {
    "plain": ((), 0.0),
    "bias": (("bias",), 0.0),
    "rank-diag": (("rank_diag",), 0.0),
    "out-diag": (("out_diag",), 0.0),
    "dropout": ((), 0.4),
    "all": (("bias", "rank_diag", "out_diag"), 0.4),
}


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


def _tensors(lead, present, dtype=torch.float64, requires_grad=True):
    sizes = {"x": (*lead, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R)}
    sizes |= {"bias": (N,), "rank_diag": (R,), "out_diag": (N,)}
    keep = ("x", "weight", "lora_a", "lora_b", *present)
    return {
        k: torch.randn(s, dtype=dtype).requires_grad_(requires_grad)
        for k, s in sizes.items()
        if k in keep
    }


def _gradcheck(fn, tensors):
    names = list(tensors)
    return torch.autograd.gradcheck(
        lambda *values: fn(**dict(zip(names, values, strict=True))), tuple(tensors.values())
    )


@pytest.mark.parametrize("lead", [(4,), (2, 3), (), (0,), (1,)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck_dense(option, lead):
    """x, W, A, B, bias and both diagonals at once."""
    present, p = OPTIONS[option]
    assert _gradcheck(
        lambda **t: F.lora_linear(**t, scale=SCALE, dropout_p=p, seed=SEED),
        _tensors(lead, present),
    )


@pytest.mark.parametrize("base", [b for b in BASES if b != "dense"])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_gradcheck_nf4(option, base):
    present, p = OPTIONS[option]
    tensors = _tensors((4,), present)
    qweight = NF4Weight.quantize(tensors.pop("weight").detach(), *BASES[base])
    assert _gradcheck(
        lambda **t: F.nf4_lora_linear(qweight=qweight, **t, scale=SCALE, dropout_p=p, seed=SEED),
        tensors,
    )


@pytest.mark.parametrize("lead", [(4,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_nf4_linear(bias, lead):
    tensors = _tensors(lead, ("bias",) if bias else ())
    qweight = NF4Weight.quantize(tensors["weight"].detach(), 32, False)
    kept = {k: tensors[k] for k in ("x", "bias") if k in tensors}
    assert _gradcheck(lambda **t: F.nf4_linear(qweight=qweight, **t), kept)


@pytest.mark.parametrize("which", ["x", "weight", "lora_a", "lora_b"])
@pytest.mark.parametrize("kind", ["transposed", "padded-rows", "every-other-column"])
def test_gradcheck_strided(kind, which):
    tensors = _tensors((4,), ("bias",))
    tensors[which] = strided(tensors[which].detach(), kind).requires_grad_()
    assert not tensors[which].is_contiguous()
    assert _gradcheck(
        lambda **t: F.lora_linear(**t, scale=SCALE, dropout_p=0.4, seed=SEED), tensors
    )


def test_gradcheck_overlapping_input():
    """Rows that share memory, as a window over a sequence has."""
    line = torch.randn(K + 6, dtype=torch.float64).requires_grad_()
    rest = _tensors((4,), ())
    del rest["x"]
    assert _gradcheck(
        lambda line, **t: F.lora_linear(line.unfold(0, K, 2), **t, scale=SCALE),
        {"line": line, **rest},
    )


def _textbook(p, **given):
    """y and every gradient, each in its tensor's dtype; everything is computed in x's."""
    leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
    t = {k: v.to(given["x"].dtype) for k, v in leaves.items()}
    dropped = t["x"]
    if p:
        keep = F.dropout_mask(dropped.shape, p, SEED)
        dropped = dropped * keep / (1 - round(p * 65536) / 65536)
    branch = dropped @ t["lora_a"].T
    if "rank_diag" in t:
        branch = branch @ torch.diag(t["rank_diag"])
    branch = 0.5 * branch @ t["lora_b"].T
    if "out_diag" in t:
        branch = branch @ torch.diag(t["out_diag"])
    y = t["x"] @ t["weight"].T + branch
    if "bias" in t:
        y = y + t["bias"]
    return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), _dy(y)))


def _ours(p, **given):
    leaves = {k: t.detach().requires_grad_() for k, t in given.items()}
    y = F.lora_linear(**leaves, scale=0.5, dropout_p=p, seed=SEED)
    return (y.detach(), *torch.autograd.grad(y, list(leaves.values()), _dy(y)))


def _dy(y):
    """A gradient of -1, 0 and 1 that is not the same everywhere."""
    return (torch.arange(y.numel()) * 7 % 5 % 3 - 1).view_as(y).to(y.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", ["same", "fp32"])
@pytest.mark.parametrize("option", OPTIONS)
def test_textbook_exactly(option, adapters, dtype):
    """Values and gradients by an expression that shares no code with the op. Small whole numbers
    leave nothing to round, so every result must be the fp64 one."""
    present, p = OPTIONS[option]
    p = 0.5 if p else 0.0
    shapes = _tensors((2, 3), present, requires_grad=False)
    t = {k: torch.randint(-1, 2, v.shape).to(dtype) for k, v in shapes.items()}
    if adapters == "fp32":
        t |= {k: v.float() for k, v in t.items() if k not in ("x", "weight", "bias")}
    expected = _textbook(p, **{k: v.double() for k, v in t.items()})
    for name, got, want in zip(["y", *t], _ours(p, **t), expected, strict=True):
        assert got.dtype == t["x" if name == "y" else name].dtype, name
        assert torch.equal(want.to(dtype).double(), want), f"{name}: the case is not exact"
        assert torch.equal(got.double(), want), name
