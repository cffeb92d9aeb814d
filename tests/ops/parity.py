"""How a case is held against the oracle, for every way of running an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.dispatch import registry
from lora_kernels.testing import FACTOR, assert_within_budget
from tests.ops.case import Case
from tests.ops.variants import bits
from tools.op_inputs.calls import call, oracle_args

# Elements of an output, and draws at most. The budget compares two errors that are both random:
# over few elements the plain one is small by luck now and then (when, differs between CPUs). More
# draws then show how large it may be; what was drawn first is still judged, by itself.
FEW, MANY = (64, 32), (2048, 256)
Result = tuple[Tensor, Tensor, Tensor]  # the one under test, the oracle's, the plain one
Active = Callable[[], AbstractContextManager[Any]]


def assert_agrees(
    case: Case, device: str, active: Active, *, repeat: bool = True, short: bool = False
) -> None:
    """The op under `active()` gives the reference's result: its bits where the case is exact, else
    through the budget; twice the same bits where `repeat`, and its inputs as they were. `short`
    goes to a backend as the public functions do outside autograd (`registry.run`)."""
    args = case.build(device)
    untouched = case.build(device)
    op = getattr(torch.ops.lora_kernels, case.op).default
    way = _short_way(case.op) if short else None
    with active():
        found = call(op, args, way)
        again = tuple(call(op, args, way).values()) if repeat else tuple(found.values())
    with use_backend("reference"):
        plain = tuple(call(op, args).values())

    names, actual = list(found), tuple(found.values())
    for name, got, second in zip(names, actual, again, strict=True):
        assert torch.equal(bits(got), bits(second)), f"{name}: differs from run to run"
    for before, after in zip(_flat(untouched), _flat(args), strict=True):
        assert torch.equal(bits(before), bits(after)), "an input was overwritten"

    if case.exact:
        for name, got, want in zip(names, actual, plain, strict=True):
            assert got.dtype == want.dtype, name
            assert torch.equal(bits(got), bits(want)), name
        return
    first = _beside_oracle(op, case, args, actual, plain)
    few, many = _draws(plain, *FEW), _draws(plain, *MANY)
    results = [first, *(_run(op, case, device, active, d, way) for d in range(1, few))]
    try:
        _hold(names, results)
    except AssertionError:
        if few == many:
            raise
        results += [_run(op, case, device, active, d, way) for d in range(few, many)]
        _hold(names, results)


def _hold(names: list[str], results: list[list[Result]]) -> None:
    """Each output's draws."""
    for name, *draws in zip(names, *results, strict=True):
        hold_draws(draws, name)


def hold_draws(draws: Sequence[Result], name: str = "result") -> None:
    """Hold an output's draws to the budget, together and one by one.

    Together their mean could hide a draw that is wrong among many that are right. So the worst is
    held to a bound on the worst: no draw, by its largest error or its rms, may be off by more than
    twice the plain expression's worst draw, plus one rounding of its own.
    """
    together = [torch.stack(t) for t in zip(*draws, strict=True)]
    assert_within_budget(*together, name)
    actual, oracle, plain = (t.double().flatten(1) for t in together)
    if oracle.numel() == 0:
        return
    rounding = torch.finfo(together[0].dtype).eps / 2
    for kind, order in (("largest", torch.inf), ("rms", 2)):
        scale = oracle.shape[1] ** (-1 / order)  # of a norm, to the mean
        got, worst, size = (
            torch.linalg.vector_norm(t, order, dim=1) * scale
            for t in (actual - oracle, plain - oracle, oracle)
        )
        allowed = FACTOR * worst.max() + rounding * size
        over = (got / allowed.clamp(min=torch.finfo(torch.float64).tiny)).nan_to_num().argmax()
        assert (got <= allowed).all(), (
            f"{name}: {kind} error {got[over]:.3e} of draw {over} of {len(draws)} is over the "
            f"budget {allowed[over]:.3e} (plain {worst.max():.3e} at worst)"
        )


def _short_way(op: str) -> Callable[..., Any]:
    return lambda *args: registry.run(op, registry.ops()[op].call(*args))


def _run(
    op: Any,
    case: Case,
    device: str,
    active: Active,
    draw: int,
    way: Callable[..., Any] | None,
) -> list[Result]:
    args = case.build(device, draw)
    with active():
        actual = tuple(call(op, args, way).values())
    with use_backend("reference"):
        plain = tuple(call(op, args).values())
    return _beside_oracle(op, case, args, actual, plain)


def _beside_oracle(
    op: Any, case: Case, args: tuple[Any, ...], actual: Any, plain: Any
) -> list[Result]:
    """Each output."""
    with use_backend("reference"):
        oracle = tuple(call(op, oracle_args(case.op, args)).values())
    return list(zip(actual, oracle, plain, strict=True))


def _draws(outputs: tuple[Tensor, ...], enough: int, most: int) -> int:
    """How often to repeat a case with other values for so many elements of its smallest output."""
    smallest = min((t.numel() for t in outputs if t.numel()), default=enough)
    return min(most, -(-enough // smallest))


def _flat(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, list):
            yield from _flat(a)
