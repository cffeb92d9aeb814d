"""The one error budget of this package, for its tests and for anyone's who adds a kernel.

A result may be off the fp64 oracle by twice the error that the plain PyTorch expression makes in
the same dtype, plus one rounding of the output: in the largest element and in the mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0


def assert_within_budget(
    actual: Tensor, oracle: Tensor, plain: Tensor, name: str = "result"
) -> None:
    """Raise AssertionError unless `actual` is as near to `oracle` as the budget asks.

    Args:
        actual: the result under test.
        oracle: the same in fp64.
        plain: the same from the plain PyTorch expression in the dtype under test.

    Examples:
        >>> from lora_kernels.testing import assert_within_budget
        >>> x, w = torch.randn(3, 64).bfloat16(), torch.randn(32, 64).bfloat16()
        >>> oracle, plain = x.double() @ w.double().T, x @ w.T
        >>> assert_within_budget(torch.nn.functional.linear(x, w), oracle, plain)
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}, not float64"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == oracle.shape == plain.shape, (
        f"{name}: shapes {list(actual.shape)}, {list(oracle.shape)}, {list(plain.shape)} differ"
    )
    if oracle.numel() == 0:
        return
    assert torch.isfinite(oracle).all(), f"{name}: the oracle is not finite"
    assert torch.isfinite(plain).all(), f"{name}: the plain result is not finite"
    assert torch.isfinite(actual).all(), f"{name}: {_count(~torch.isfinite(actual))} not finite"
    error = (actual.double() - oracle).abs()
    plain_error = (plain.double() - oracle).abs()
    rounding = torch.finfo(actual.dtype).eps / 2
    for kind, reduce in (("largest", torch.amax), ("rms", _rms)):
        got = reduce(error).item()
        allowed = FACTOR * reduce(plain_error).item() + rounding * reduce(oracle.abs()).item()
        assert got <= allowed, (
            f"{name}: {kind} error {got:.3e} is over the budget {allowed:.3e} "
            f"(plain {reduce(plain_error).item():.3e}, {actual.dtype}, "
            f"shape {list(actual.shape)}, worst at {_where(error)})"
        )


def assert_call_within_budget(
    fn: Callable[..., Any],
    plain: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Hold `fn(*args)` against `plain`: the oracle is `plain` on the same values in fp64.

    Floating tensors (also in lists) are converted; a tuple of results is checked one by one.

    Examples:
        >>> from lora_kernels.testing import assert_call_within_budget
        >>> def plain(gate, up):
        ...     return torch.nn.functional.silu(gate) * up
        >>> args = [torch.randn(3, 96), torch.randn(3, 96)]
        >>> assert_call_within_budget(lk.functional.gated_activation, plain, args)
    """
    kwargs = kwargs or {}
    actual = _tuple(fn(*args, **kwargs))
    expected = _tuple(plain(*args, **kwargs))
    oracle = _tuple(plain(*_double(list(args)), **_double(kwargs)))
    names = names or [f"output {i}" for i in range(len(actual))]
    for name, got, want, exact in zip(names, actual, expected, oracle, strict=True):
        assert_within_budget(got, exact, want, name)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_double(v) for v in value)
    return value


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def _count(mask: Tensor) -> int:
    return int(mask.sum().item())


def _where(error: Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
