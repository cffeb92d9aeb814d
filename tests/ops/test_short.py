"""The short way of a layer's usual call (ops/lora/short.py): the same bits, and nothing unusual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import lora_kernels as lk
from lora_kernels.dispatch import native
from lora_kernels.ops.lora import api

fn = lk.functional
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
K, N, R = 192, 96, 8


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the short way answered, call by call."""
    answers: list[bool] = []
    short = api.short

    def watched(*args: object) -> Tensor | None:
        y = short(*args)  # type: ignore[arg-type]
        answers.append(y is not None)
        return y

    monkeypatch.setattr(api, "short", watched)
    return answers


def operands(dtype: torch.dtype, *leading: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "x": draw(*leading, K).to(dtype),
        "weight": (draw(N, K) / 8).to(dtype),
        "lora_a": draw(R, K) / 8,
        "lora_b": draw(N, R) / 8,
        "bias": draw(N).to(dtype),
    }


needs_native = pytest.mark.skipif(not native.available(), reason="needs the compiled extension")


@needs_native
@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (5, 1, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_the_op(
    dtype: torch.dtype, leading: tuple[int, ...], quantised: bool, taken: list[bool]
) -> None:
    given = operands(dtype, *leading)
    x, weight, a, b, bias = given.values()
    base, meta = [weight], [N, K]
    if quantised:
        w4 = lk.NF4Weight.quantize(weight)
        base, meta = w4.base, w4.meta
        y = fn.nf4_lora_linear(x, w4, a, b, scale=0.5, bias=bias)
    else:
        y = fn.lora_linear(x, weight, a, b, scale=0.5, bias=bias)
    rows = x.reshape(-1, K)
    op = torch.ops.lora_kernels.lora_linear_fwd
    expected, _ = op(rows, base, meta, a, b, 0.5, bias, 0.0, None, None, None)
    assert taken == [True]
    assert y.dtype == dtype and torch.equal(y, expected.view(*leading, N))


@needs_native
def test_what_it_leaves_to_the_usual_way(taken: list[bool]) -> None:
    given = operands(torch.bfloat16, 3)
    usual = fn.lora_linear(**given)
    assert taken == [True]
    x = given["x"]
    with lk.use_backend("reference"):
        fn.lora_linear(**given)
    assert len(lk.explain(fn.lora_linear, **given)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        fn.lora_linear(**given)
    for name in ("lora_a", "lora_b", "weight", "bias"):
        with pytest.raises(ValueError, match=name):
            fn.lora_linear(**{**given, name: given[name].to("meta")})
    columns = x.T.contiguous().T  # not contiguous
    assert torch.equal(fn.lora_linear(**{**given, "x": columns}), usual)
    wide = {k: v.double() for k, v in given.items()}
    assert fn.lora_linear(**wide).dtype == torch.float64
    fn.lora_linear(**{**given, "weight": given["weight"].clone().requires_grad_()})
    fn.lora_linear(**given, out_diag=torch.ones(N))
    fn.lora_linear(**given, dropout_p=1e-5)
    meta = {k: v.to("meta") for k, v in given.items()}
    assert fn.lora_linear(**meta).is_meta
    assert taken == [True] + [False] * (len(taken) - 1) and len(taken) == 13
    with torch.no_grad():
        fn.lora_linear(**{**given, "lora_a": given["lora_a"].clone().requires_grad_()})
    assert taken[-1]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(3, K + 1, dtype=torch.bfloat16)}, ValueError, r"x: "),
        ({"x": torch.zeros(3, K)}, TypeError, r"weight: "),
        ({"lora_a": torch.zeros(R, K + 1)}, ValueError, r"lora_a: got shape \[8, 193\]"),
        ({"lora_a": torch.zeros(0, K)}, ValueError, r"lora_a: got shape \[0, 192\]"),
        ({"lora_b": torch.zeros(N, R + 1)}, ValueError, r"lora_b: got shape \[96, 9\]"),
        ({"lora_b": torch.zeros(N, R).half()}, TypeError, r"lora_b: got dtype"),
        ({"bias": torch.zeros(N)}, TypeError, r"bias: got dtype"),
        ({"bias": torch.zeros(N + 1).bfloat16()}, ValueError, r"bias: got shape \[97\]"),
        ({"rank_diag": torch.zeros(R + 1)}, ValueError, r"rank_diag: got shape \[9\]"),
        ({"seed": torch.zeros(1)}, TypeError, r"seed: got dtype"),
        ({"seed": torch.zeros(2).long(), "dropout_p": 0.5}, ValueError, r"seed: got shape \[2\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: got 1.0"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p: got nan"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_errors_are_those_of_every_call(
    changed: dict[str, Any], error: type[Exception], message: str, trained: bool
) -> None:
    given = operands(torch.bfloat16, 3) | changed
    with pytest.raises(error, match=message):
        fn.lora_linear(**given | {"lora_a": given["lora_a"].clone().requires_grad_(trained)})


# --- trained --------------------------------------------------------------------------------------

SEED = torch.tensor([-3])
ASKED = (
    ("x", "lora_a", "lora_b"),
    ("lora_a", "lora_b"),
    ("lora_b",),  # LoRA-FA
    ("x",),
    ("x", "lora_a", "lora_b", "bias", "rank_diag"),
    ("rank_diag",),
)


def step(
    given: dict[str, Any],
    asked: Sequence[str],
    dy: Callable[[Tensor], Tensor] = torch.ones_like,
    quantised: str | None = None,
    backward: Callable[[], Any] = nullcontext,
    **options: Any,
) -> list[Tensor | None]:
    """y and the gradients of all that is given."""
    t = {k: v.detach().clone().requires_grad_(k in asked) for k, v in given.items()}
    weight = t.pop("weight")
    if quantised is None:
        y = fn.lora_linear(weight=weight, **t, **options)
    else:
        form = {"double_quant": quantised == "nf4", "quant_type": quantised.removesuffix("-plain")}
        y = fn.nf4_lora_linear(qweight=lk.NF4Weight.quantize(weight, **form), **t, **options)
    with backward():
        y.backward(dy(y))
    return [y.detach(), *(v.grad for v in t.values())]


def same(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.dtype == want.dtype and torch.equal(got, want)


@contextmanager
def usual() -> Iterator[None]:
    """The way of every call, on the same kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "short", lambda *args: None)
        yield


GRADS = {
    "rows": lambda y: torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype),
    "of a sum": lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
    "apart": lambda y: torch.linspace(-1, 2, 2 * y.numel()).view(*y.shape[:-1], 2 * N)[..., :N],
    "turned": lambda y: (
        torch.linspace(-1, 2, y.numel()).view(y.shape[::-1]).permute(*reversed(range(y.dim())))
    ),
}


@needs_native
@pytest.mark.parametrize("quantised", [None, "nf4", "nf4-plain", "fp4"])
@pytest.mark.parametrize("leading", [(), (0,), (1,), (37,), (2, 3), (0, 4), (5, 1, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_call_has_the_same_bits(
    dtype: torch.dtype, leading: tuple[int, ...], quantised: str | None, taken: list[bool]
) -> None:
    """Forward and backward, with and without dropout, of what trains and of 16-bit adapters."""
    given = operands(dtype, *leading)
    diagonal = torch.linspace(-1, 1, R)
    cases = []
    for i, asked in enumerate(ASKED):
        more = {"rank_diag": diagonal} if "rank_diag" in asked else {}
        options = {"scale": 0.5, "dropout_p": (0.0, 0.3)[i % 2], "quantised": quantised}
        cases += [(given | more, asked, {**options, "seed": SEED})]
    cases += [({k: v.to(dtype) for k, v in given.items()}, ASKED[0], {"quantised": quantised})]
    kinds = list(GRADS.values())
    for i, (tensors, asked, options) in enumerate(cases):
        kind = kinds[(i + sum(leading)) % len(kinds)]
        dy = lambda y, kind=kind: kind(y).to(y.dtype)  # noqa: E731
        found = step(tensors, asked, dy, **options)
        with usual():
            wanted = step(tensors, asked, dy, **options)
        same(found, wanted)
    assert taken and all(taken)


@needs_native
def test_it_draws_the_same_seed(taken: list[bool]) -> None:
    given, asked = operands(torch.bfloat16, 5), ASKED[0]
    for rows in (given["x"], given["x"].T.contiguous().T):  # the second is none of its calls
        torch.manual_seed(11)
        found, after = step(given | {"x": rows}, asked, dropout_p=0.2), torch.rand(())
        torch.manual_seed(11)
        with usual():
            same(found, step(given | {"x": rows}, asked, dropout_p=0.2))
        assert torch.equal(torch.rand(()), after)
    with torch.no_grad():  # as in a checkpoint's forward
        torch.manual_seed(11)
        y = fn.lora_linear(**given, dropout_p=0.2)
        torch.manual_seed(11)
        with usual():
            assert torch.equal(y, fn.lora_linear(**given, dropout_p=0.2))
    assert taken[-1]


@needs_native
@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "weight"])
def test_what_is_saved_may_not_be_written_over(name: str, taken: list[bool]) -> None:
    given = operands(torch.bfloat16, 3)
    t = {k: v.clone().requires_grad_(k.startswith("lora")) for k, v in given.items()}
    y = fn.lora_linear(**t)
    with torch.no_grad():
        t[name].add_(1)
    assert taken == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_native
def test_the_codes_may_not_be_written_over(taken: list[bool]) -> None:
    given = operands(torch.bfloat16, 3)
    w4 = lk.NF4Weight.quantize(given["weight"])
    a = given["lora_a"].requires_grad_()
    y = fn.nf4_lora_linear(given["x"], w4, a, given["lora_b"])
    w4.packed.add_(1)
    assert taken == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_native
def test_it_cannot_be_differentiated_twice(taken: list[bool]) -> None:
    given = operands(torch.float32, 3)
    x = given["x"].requires_grad_()
    y = fn.lora_linear(**given)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert taken == [True] and dx.requires_grad
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@needs_native
@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
def test_a_backward_that_somebody_watches_takes_the_usual_way(leading: tuple[int, ...]) -> None:
    given, asked = operands(torch.bfloat16, *leading), ASKED[4]
    given["rank_diag"] = torch.linspace(-1, 1, R)
    wanted = step(given, asked)
    same(step(given, asked, backward=lambda: lk.use_backend("native")), wanted)
    counter = FlopCounterMode(display=False)
    same(step(given, asked, backward=lambda: counter), wanted)
    assert counter.get_total_flops() > 0
    t = {k: v.clone().requires_grad_(k in asked) for k, v in given.items()}
    y = fn.lora_linear(**t)
    explained = lk.explain(lambda: y.sum().backward())
    assert [e.op for e in explained] == ["lora_linear_bwd"]


@needs_native
@pytest.mark.parametrize("quantised", [None, "nf4"])
def test_a_checkpoint_may_take_one_way_and_then_the_other(
    quantised: str | None, taken: list[bool]
) -> None:
    given = operands(torch.bfloat16, 2, 3)
    w4 = lk.NF4Weight.quantize(given["weight"])
    grads = []
    for forced in (False, True):
        x, a = given["x"].clone().requires_grad_(), given["lora_a"].clone().requires_grad_()

        def layer(x: Tensor, a: Tensor = a) -> Tensor:
            rest = {"bias": given["bias"], "dropout_p": 0.2, "scale": 0.5}
            if quantised:
                return fn.nf4_lora_linear(x, w4, a, given["lora_b"], **rest)
            return fn.lora_linear(x, given["weight"], a, given["lora_b"], **rest)

        torch.manual_seed(5)
        # To the end of the layer's second run, so that its way is known.
        with lk.use_backend("native" if forced else None), set_checkpoint_early_stop(False):
            y = checkpoint(layer, x, use_reentrant=False)
        y.sum().backward()
        grads.append([y.detach(), x.grad, a.grad])
    same(*grads)
    assert taken == [True, True, False, True]


@needs_native
def test_what_comes_back_otherwise_is_taken_as_it_is() -> None:
    """A hook on saved tensors may give back other strides."""
    given, asked = operands(torch.bfloat16, 4), ASKED[0]
    turned = lambda t: t.T.contiguous().T if t.dim() == 2 else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        found = step(given, asked)
    for got, want in zip(found, step(given, asked), strict=True):
        if want is not None:  # the reference may run here: A and B have other strides too
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@needs_native
def test_a_lazily_negated_tensor() -> None:
    given, asked = operands(torch.float32, 4), ASKED[0]
    negated = torch._neg_view(given["x"])
    for trained in (False, True):
        with torch.set_grad_enabled(trained):
            t = {k: v.clone().requires_grad_(trained and k in asked) for k, v in given.items()}
            y = fn.lora_linear(**t | {"x": negated})
            z = fn.lora_linear(**t | {"x": -given["x"]})
        assert torch.equal(y, z)
        if trained:
            first = torch.autograd.grad(y.sum(), t["lora_a"])
            assert torch.equal(*first, *torch.autograd.grad(z.sum(), t["lora_a"]))
