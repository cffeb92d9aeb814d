"""What a provider is: a name, a reason to refuse a case, and a factory of prepared calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.data import CaseData

Outputs = dict[str, Tensor]
Result = Tensor | tuple[Tensor, ...]
FULL, BASE = "full", "base"


@dataclass
class Prepared:
    """One provider's call, ready to be verified and timed.

    Attributes:
        call: runs copy i of the weight and returns the results by name: `y` (of several
            projections `y0`, `y1`, ...), with gradients also `dx` (but of ids) and, with an
            adapter, `d` and the name of each tensor of `CaseData.trained` (`da`, `db`), of a gated
            activation `dup`; `loss` and `dx` of a cross-entropy; `w`, or `packed` and `absmax`, for
            codecs.
        copies: how many weight copies there are; `call` takes any i and wraps around.
        computes: "full", or "base" where the adapter is left out (the frozen linear).
        forward: the forward alone with gradients on, for counting what it keeps; else None.
        parameters: weights and adapters, which do not count as kept.
        masks: after the same `torch.manual_seed`, the multipliers (0 or 1/(1-p)) that the call's
            dropout applied, one for each layer in the shape of its input; None where that cannot be
            known from outside.
        context: entered around verification and timing, outside the timed region.
        grad: whether gradients are on during the call.
    """

    call: Callable[[int], Outputs]
    copies: int
    computes: str = FULL
    forward: Callable[[int], object] | None = None
    parameters: Sequence[Tensor] = ()
    masks: Callable[[], Sequence[Tensor]] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    grad: bool = False


@dataclass(frozen=True)
class Provider:
    """Declared once in `providers/__init__.py`.

    `refuses` looks at the case and the device and returns one line that says why not, or None.
    `suites` says where it runs unasked: "all", "short" suites only (ours in plain PyTorch, whose
    time tells nothing beside a kernel's), "long" ones only (half a minute to build), or "models".
    """

    name: str
    ops: tuple[str, ...]
    build: Callable[[CaseData], Prepared]
    refuses: Callable[[Case, torch.device], str | None] = field(default=lambda case, device: None)
    ours: bool = False
    suites: str = "all"

    def refusal(self, case: Case, device: torch.device) -> str | None:
        if case.op not in self.ops:
            return f"does not do {case.op}"
        return self.refuses(case, device)


def linear_call(
    data: CaseData,
    forward: Callable[[int, Tensor], Result],
    copies: int,
    trained: Callable[[int], Mapping[str, Tensor]] = lambda i: {},
    **prepared: Any,
) -> Prepared:
    """Forward of a layer (or several), or forward and backward, as the case asks.

    Args:
        forward: y, or a tuple of them, for weight copy i (already within `copies`) and x.
        trained: the tensors beside x whose gradients are wanted, of copy i, by name.
    """
    x, dy = data.x, data.dy

    def call(i: int) -> Outputs:
        return named(forward(i % copies, x[i % len(x)]))

    def call_both(i: int) -> Outputs:
        copy = i % copies
        xi = x[i % len(x)]
        y = named(forward(copy, xi))
        inputs = {**({"x": xi} if xi.is_floating_point() else {}), **trained(copy)}
        grads = torch.autograd.grad(list(y.values()), list(inputs.values()), dy[i % len(dy)])
        return {**y, **{f"d{name}": t for name, t in zip(inputs, grads, strict=True)}}

    backward = data.case.backward
    return Prepared(
        call=call_both if backward else call,
        copies=copies,
        forward=(lambda i: forward(i % copies, x[i % len(x)])) if backward else None,
        grad=prepared.pop("grad", backward),
        **prepared,
    )


def named(y: Result) -> Outputs:
    """`y` of one output, `y0`, `y1`, ... of several."""
    if isinstance(y, Tensor):
        return {"y": y}
    return {f"y{i}": t for i, t in enumerate(y)}


def loss_call(data: CaseData, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Prepared:
    """A cross-entropy of x, W and the labels, or that and the gradient of x, as the case asks."""
    weights, x, labels = data.dense_copies, data.x, data.labels

    def forward(i: int) -> Tensor:
        return loss(x[i % len(x)], weights[i % len(weights)], labels)

    def call_both(i: int) -> Outputs:
        value = forward(i)
        return {"loss": value, "dx": torch.autograd.grad(value, x[i % len(x)])[0]}

    backward = data.case.backward
    return Prepared(
        call=call_both if backward else lambda i: {"loss": forward(i)},
        copies=len(weights),
        forward=forward if backward else None,
        parameters=weights,
        grad=backward,
    )
