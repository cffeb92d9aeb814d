"""Schemas, checks and fakes of the gated linear units. g and u are 2-D here; `api.py` flattens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape

# What the ops' integer counts: σ is the logistic function, Φ the normal distribution.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def activation_index(activation: str) -> int:
    """The ops' number of an activation, or ValueError."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS.index(activation)


def check_glu(gate: Tensor, up: Tensor) -> None:
    """Raise ValueError or TypeError that names the argument which does not fit."""
    check_dtype("gate", gate, FLOATS)
    if gate.dim() == 0:
        raise ValueError("gate: got shape [], expected [..., I]")
    check_shape("up", up, gate.shape)
    check_dtype("up", up, [gate.dtype])
    check_device("up", up, gate.device)


@define("glu_fwd", "Tensor h", flops=None)
class GLUForward(NamedTuple):
    """h = act(g) * u."""

    g: Tensor
    u: Tensor
    activation: int

    def fake(self) -> Tensor:
        return self.g.new_empty(tuple(self.g.shape))


@define("glu_bwd", "(Tensor dg, Tensor du, Tensor h)", flops=None)
class GLUBackward(NamedTuple):
    """dg = dh * u * act'(g), du = dh * act(g) and, where asked, h again."""

    dh: Tensor
    g: Tensor
    u: Tensor
    activation: int
    need_h: bool

    def fake(self) -> tuple[Tensor, Tensor, Tensor]:
        g, shape = self.g, tuple(self.g.shape)
        return g.new_empty(shape), g.new_empty(shape), g.new_empty(shape if self.need_h else (0,))
