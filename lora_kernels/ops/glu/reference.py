"""Gated linear units in plain PyTorch: the oracle of every other backend.

Computed in fp32 for 16-bit tensors and rounded once, as in torch's own activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.glu.schema import GLUBackward, GLUForward


def activate(g: Tensor, activation: int) -> Tensor:
    """silu: g·σ(g);  gelu: g·Φ(g);  gelu_tanh: g·(1 + tanh z)/2, z = √(2/π)·(g + 0.044715·g³)."""
    if activation == 0:
        return torch.nn.functional.silu(g)
    return torch.nn.functional.gelu(g, approximate="tanh" if activation == 2 else "none")


def slope(g: Tensor, activation: int) -> Tensor:
    """The derivative of `activate`."""
    if activation == 0:
        s = torch.sigmoid(g)
        return s * (1 + g * (1 - s))
    if activation == 1:
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(g / math.sqrt(2))) + g * density
    z = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    dz = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g * g)
    t = torch.tanh(z)
    return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * dz


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


@register_reference
def glu_fwd(c: GLUForward) -> Tensor:
    """h = act(g) * u."""
    wide_g, wide_u = _wide(c.g, c.u)
    h = activate(wide_g, c.activation) * wide_u
    return h.to(c.g.dtype).contiguous()


@register_reference
def glu_bwd(c: GLUBackward) -> tuple[Tensor, Tensor, Tensor]:
    """dg = dh * u * act'(g);  du = dh * act(g);  h = act(g) * u."""
    wide_dh, wide_g, wide_u = _wide(c.dh, c.g, c.u)
    act = activate(wide_g, c.activation)
    grads = [wide_dh * wide_u * slope(wide_g, c.activation), wide_dh * act]
    h = act * wide_u if c.need_h else c.g.new_empty(0)
    dg, du, h = (t.to(c.g.dtype).contiguous() for t in (*grads, h))
    return dg, du, h
