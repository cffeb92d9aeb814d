"""The short way of a layer that is not trained (ops/lora/infer.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
    infer = api.infer

    def watched(*args: object) -> Tensor | None:
        y = infer(*args)  # type: ignore[arg-type]
        answers.append(y is not None)
        return y

    monkeypatch.setattr(api, "infer", watched)
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
    fn.lora_linear(**{**given, "x": x.clone().requires_grad_()}).sum().backward()
    fn.lora_linear(**{**given, "lora_a": given["lora_a"].clone().requires_grad_()})
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
    ],
)
def test_errors_are_those_of_every_call(
    changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fn.lora_linear(**operands(torch.bfloat16, 3) | changed)
