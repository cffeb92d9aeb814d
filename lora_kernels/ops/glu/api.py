"""h = act(g) * u, the gate of a transformer's MLP, in one pass each way.

Source: Shazeer, 2020, "GLU Variants Improve Transformer" (SwiGLU, GeGLU).

Backward, with dh = ∂L/∂h:
    dg = dh * u * act'(g)
    du = dh * act(g)
    silu       act(g) = g·σ(g)            act' = σ + g·σ·(1 - σ)
    gelu       act(g) = g·Φ(g)            act' = Φ + g·φ(g)
    gelu_tanh  act(g) = g·σ(2z)           act' = σ + g·σ·(1 - σ)·2z',  σ = σ(2z),
               z = √(2/π)·(g + 0.044715·g³); the same as g/2·(1 + tanh z)
Saved: g and u.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.glu.schema import activation_index, check_glu


class GatedActivationFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, activation: int) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.activation = activation
        return torch.ops.lora_kernels.glu_fwd(g, u, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, u = ctx.saved_tensors
        dg, du, _ = torch.ops.lora_kernels.glu_bwd(dh, g, u, ctx.activation, False)
        asked = ctx.needs_input_grad
        return dg if asked[0] else None, du if asked[1] else None, None


def gated_activation(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, computed in fp32 and rounded once.

    Differentiable in both; between forward and backward both are kept, nothing else.

    Args:
        gate: [..., I]; fp32, fp16, bf16 (fp64 on the reference).
        up: [..., I] in gate's dtype.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, with the exact error function) or "gelu_tanh"
            (GeGLU with the usual approximation by tanh).

    Returns:
        [..., I] in gate's dtype.

    Raises:
        ValueError: a shape, a device or the activation does not fit.
        TypeError: a dtype does not fit.

    Source: Shazeer, 2020, "GLU Variants Improve Transformer".

    Examples:
        >>> gate, up = torch.randn(3, 96), torch.randn(3, 96)
        >>> lk.functional.gated_activation(gate, up, "silu").shape
        torch.Size([3, 96])
    """
    try:
        index = activation_index(activation)
        check_glu(gate, up)
        g, u = to_rows(gate), to_rows(up)
        if needs_grad(gate, up):
            h = GatedActivationFunction.apply(g, u, index)
        else:
            h = torch.ops.lora_kernels.glu_fwd(g, u, index)
        return from_rows(h, gate)
    except Exception:
        check_kinds(gated_activation, locals())
        raise
