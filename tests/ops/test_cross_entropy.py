"""The loss over a vocabulary: against torch's own, in the cases torch defines, and in pieces."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import functional as F
from lora_kernels import use_backend
from lora_kernels.ops.cross_entropy import native
from lora_kernels.testing import assert_call_within_budget
from tests.ops.variants import all_variants

M, K, V = 12, 20, 50
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = [v for v in all_variants() if v.backend != "triton" and v.device == "cpu"]


def _inputs(dtype=torch.float32, shape=(M,)):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, K, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(V, K, generator=g) * 0.3).to(dtype).requires_grad_()
    labels = torch.randint(V, shape, generator=g)
    labels.view(-1)[1::4] = -100
    return x, w, labels


def _torch(x, w, labels):
    logits = x @ w.T
    wide = logits if x.dtype == torch.float64 else logits.float()
    return TF.cross_entropy(wide.reshape(-1, V), labels.reshape(-1))


def _both(loss):
    """The loss and its gradients as one function of x, w and labels."""

    def call(x, w, labels):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss(x, w, labels)
        return value.detach(), *torch.autograd.grad(value * 0.7, (x, w))

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", BACKENDS, ids=str)
def test_is_torchs_loss(variant, dtype):
    with variant.active():
        assert_call_within_budget(
            _both(F.linear_cross_entropy), _both(_torch), _inputs(dtype), names=("loss", "dx", "dw")
        )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 5), (0,)], ids=str)
def test_any_leading_dimensions(shape):
    x, w, labels = _inputs(shape=shape)
    loss = F.linear_cross_entropy(x, w, labels)
    flat = F.linear_cross_entropy(x.reshape(-1, K), w, labels.reshape(-1))
    torch.testing.assert_close(loss, flat, rtol=0, atol=0, equal_nan=True)
    assert torch.autograd.grad(loss, x)[0].shape == x.shape


@pytest.mark.parametrize("variant", BACKENDS, ids=str)
def test_without_a_label_the_gradient_is_nothing(variant):
    x, w, labels = _inputs()
    labels.fill_(-100)
    want = torch.autograd.grad(TF.cross_entropy(x @ w.T, labels), (x, w))
    with variant.active():
        loss = F.linear_cross_entropy(x, w, labels)
        got = torch.autograd.grad(loss, (x, w))
    assert loss.isnan()
    assert all(map(torch.equal, got, want)) and not any(g.any() for g in got)


def test_gradcheck():
    x, w, labels = (t.double().detach() if t.is_floating_point() else t for t in _inputs())
    x, w = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: F.linear_cross_entropy(x, w, labels), (x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_pieces(dtype, monkeypatch):
    """Pieces of one row, of a few, and of all: the same losses and dx, bit for bit."""
    x, w, labels = _inputs(dtype)
    op = torch.ops.lora_kernels.linear_cross_entropy
    with torch.no_grad(), use_backend("native"):
        whole = op(x, w, labels, -100, [True, True])
        for rows, step in ((1, 1), (5, 1), (4, 4), (8, 4)):  # the last two fill a piece up
            monkeypatch.setattr(native, "LOGITS_BYTES", rows * V * x.element_size())
            monkeypatch.setattr(native, "LEAST_ROWS", 1)
            monkeypatch.setattr(native, "ROWS_STEP", step)
            pieces = op(x, w, labels, -100, [True, True])
            assert_call_within_budget(
                lambda *_, p=pieces: p,
                lambda x, w, whole=whole: _reference(x, w, labels),
                (x, w),
                names=("losses", "dx", "dw"),
            )
            assert pieces[0].shape == whole[0].shape


def _reference(x, w, labels):
    with use_backend("reference"):
        return torch.ops.lora_kernels.linear_cross_entropy(x, w, labels, -100, [True, True])


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor(7), torch.tensor([7.0])], ids=repr)
def test_num_items(items):
    x, w, labels = _inputs()
    assert_call_within_budget(
        lambda x, w: F.linear_cross_entropy(x, w, labels, num_items=items),
        lambda x, w: TF.cross_entropy(x @ w.T, labels, reduction="sum") / 7,
        (x.detach(), w.detach()),
    )


@pytest.mark.parametrize("variant", BACKENDS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number(variant, bad):
    """Its row is NaN, loss and gradient, and no other row is touched."""
    logits = torch.randn(3, 40)
    clean = logits.clone()
    logits[1, 33] = bad
    labels = torch.tensor([4, 5, 6])
    op = torch.ops.lora_kernels.cross_entropy
    with variant.active():
        losses, grad = op(logits, labels, -100, True)
        want, want_grad = op(clean, labels, -100, True)
    assert losses[1].isnan() and grad[1].isnan().all()
    assert torch.equal(losses[[0, 2]], want[[0, 2]])
    assert torch.equal(grad[[0, 2]], want_grad[[0, 2]])


@pytest.mark.parametrize("variant", BACKENDS, ids=str)
def test_minus_infinity_is_a_probability_of_nothing(variant):
    logits = torch.full((1, 40), -math.inf)
    logits[0, 3] = 2.0
    with variant.active():
        losses, grad = torch.ops.lora_kernels.cross_entropy(logits, torch.tensor([3]), -100, True)
    assert losses.item() == 0.0
    assert not grad.any()


def test_no_label_at_all():
    """torch's mean of nothing is NaN; with a given number of items it is 0."""
    x, w, labels = _inputs()
    labels.fill_(-100)
    assert F.linear_cross_entropy(x, w, labels).isnan()
    loss = F.linear_cross_entropy(x, w, labels, num_items=5)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_only_what_is_asked():
    x, w, labels = _inputs()
    F.linear_cross_entropy(x, w.detach(), labels).backward()
    assert x.grad is not None and w.grad is None
    with torch.no_grad():
        assert not F.linear_cross_entropy(x, w, labels).requires_grad


def test_keeps_no_logits():
    x, w, labels = _inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear_cross_entropy(x, w.detach(), labels)
    assert sum(t.numel() for t in kept) <= M * K + 1  # dx and the divisor


def test_autocast():
    x, w, labels = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.linear_cross_entropy(x, w, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.linear_cross_entropy(x.bfloat16(), w.bfloat16(), labels))
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fullgraph_with_a_dynamic_batch(dtype):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(F.linear_cross_entropy, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 3, 64):
        x, w, labels = _inputs(dtype, (rows, 2))
        for want, got in zip(
            _both(F.linear_cross_entropy)(x, w, labels), _both(compiled)(x, w, labels), strict=True
        ):
            assert torch.equal(want, got)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("label", [V, -1, -101, 2**40])
def test_a_label_that_is_no_token(backend, label):
    x, w, labels = _inputs()
    labels[3] = label
    says = rf"^labels: got {label} at index 3, expected 0 to {V - 1} or -100"
    with use_backend(backend), pytest.raises(ValueError, match=says):
        F.linear_cross_entropy(x, w, labels)


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("x", torch.randn(()), ValueError, r"got shape \[\], expected \[\.\.\., K\]"),
        ("x", torch.ones(M, K, dtype=torch.int64), TypeError, "got dtype int64"),
        ("weight", torch.randn(V, K + 1), ValueError, r"got shape \[50, 21\], expected \[V, 20\]"),
        ("weight", torch.randn(0, K), ValueError, r"got shape \[0, 20\], expected a row or more"),
        ("weight", torch.randn(V, K).bfloat16(), TypeError, "got dtype bfloat16, expected float32"),
        ("weight", torch.randn(V, K, device="meta"), ValueError, "is on meta, expected cpu"),
        ("labels", torch.zeros(M + 1, dtype=torch.int64), ValueError, r"got shape \[13\]"),
        ("labels", torch.zeros(M), TypeError, "got dtype float32, expected int64"),
        ("num_items", "7", TypeError, "got '7', expected a Tensor or a number or None"),
        ("num_items", torch.ones(2), ValueError, r"got shape \[2\], expected one element"),
    ],
)
def test_bad_input(name, value, error, says):
    x, w, labels = _inputs()
    given = dict(x=x, weight=w, labels=labels) | {name: value}
    with pytest.raises(error, match=f"^{name}: {says}"):
        F.linear_cross_entropy(**given)
