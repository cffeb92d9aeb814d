"""What a provider is: a name, a reason to refuse a case, and a factory of prepared calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.data import CaseData

Outputs = dict[str, Tensor]
FULL, BASE = "full", "base"


@dataclass
class Prepared:
    """One provider's call, ready to be verified and timed.

    Attributes:
        call: runs copy i of the weight and returns the results by name: `y`, with gradients also
            `dx` and, with an adapter, `da` and `db`; `loss` and `dx` of a cross-entropy; `w`, or
            `packed` and `absmax`, for codecs.
        copies: how many weight copies there are; `call` takes any i and wraps around.
        computes: "full", or "base" where the adapter is left out (the frozen linear).
        forward: the forward alone with gradients on, for counting what it keeps; else None.
        parameters: weights and adapters, which do not count as kept.
        mask: after the same `torch.manual_seed`, the multiplier (0 or 1/(1-p)) [M, K] that the
            call's dropout applied; None where that cannot be known from outside.
        context: entered around verification and timing, outside the timed region.
        grad: whether gradients are on during the call.
    """

    call: Callable[[int], Outputs]
    copies: int
    computes: str = FULL
    forward: Callable[[int], Tensor] | None = None
    parameters: Sequence[Tensor] = ()
    mask: Callable[[], Tensor] | None = None
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    grad: bool = False


@dataclass(frozen=True)
class Provider:
    """Declared once in `providers/__init__.py`.

    `refuses` looks at the case and the device and returns one line that says why not, or None.
    `suites` says where it runs unasked: "all", "short" suites only (ours in plain PyTorch, whose
    time tells nothing beside a kernel's) or "long" ones only (half a minute to build).
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
    forward: Callable[[int, Tensor], Tensor],
    copies: int,
    adapters: Callable[[int], tuple[Tensor, ...]] = lambda i: (),
    **prepared: Any,
) -> Prepared:
    """A layer's forward, or forward and backward, as the case asks.

    Args:
        forward: y for weight copy i (already within `copies`) and x.
        adapters: the tensors A, B of copy i whose gradients are wanted.
    """
    x, dy = data.x, data.dy
    names = ("dx", "da", "db")

    def call(i: int) -> Outputs:
        return {"y": forward(i % copies, x[i % len(x)])}

    def call_both(i: int) -> Outputs:
        copy = i % copies
        xi = x[i % len(x)]
        y = forward(copy, xi)
        grads = torch.autograd.grad(y, (xi, *adapters(copy)), dy[i % len(dy)])
        return {"y": y, **dict(zip(names, grads, strict=False))}

    backward = data.case.backward
    return Prepared(
        call=call_both if backward else call,
        copies=copies,
        forward=(lambda i: forward(i % copies, x[i % len(x)])) if backward else None,
        grad=prepared.pop("grad", backward),
        **prepared,
    )


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
