"""y = x·Wᵀ + bias over a 4-bit weight.

Backward: dx = dy·W with W decoded from the same bytes; the weight is frozen; dbias = Σ_m dy.
Nothing but the weight itself is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.nf4.schema import check_linear
from lora_kernels.ops.nf4.weight import NF4Weight


class NF4LinearFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, meta: list[int], *base: Tensor) -> Tensor:
        ctx.save_for_backward(*base)
        ctx.meta = meta
        return torch.ops.lora_kernels.nf4_linear_fwd(x, list(base), meta, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        base = list(ctx.saved_tensors)  # once: checkpointing and offloading unpack at each read
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.lora_kernels.nf4_linear_bwd(to_rows(dy), base, ctx.meta)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0)
        return (dx, dbias, None, *(None for _ in base))


def nf4_linear(x: Tensor, qweight: NF4Weight, *, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias with W stored in 4 bits (Dettmers et al., 2023, "QLoRA").

    W is decoded to x's dtype (code * scale in fp32, rounded once); products accumulate in fp32.
    Under autocast x is cast to the autocast dtype.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        qweight: the frozen weight [N, K].
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype; differentiable in x and bias.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.

    Examples:
        >>> weight = lk.NF4Weight.quantize(torch.randn(32, 64))
        >>> lk.functional.nf4_linear(torch.randn(3, 64), weight).shape
        torch.Size([3, 32])
    """
    try:
        x, bias = autocast(x, bias)
        base, meta = qweight.check().base, qweight.meta
        check_linear(x, base, meta, bias)
        rows = to_rows(x)
        if needs_grad(x, bias):
            y = NF4LinearFunction.apply(rows, bias, meta, *base)
        else:
            y = torch.ops.lora_kernels.nf4_linear_fwd(rows, base, meta, bias)
        return from_rows(y, x)
    except Exception:
        check_kinds(nf4_linear, locals())
        raise
