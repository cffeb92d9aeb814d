"""DoRA: y = m̂ ∘ (x·Wᵀ + scale·x·Aᵀ·Bᵀ) + bias with m̂ = magnitude / ‖W + scale·B·A‖, row by row.

Source: Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"; the norm gets no gradient
(its section 4.3), and dropout acts as in PEFT.

With c = scale, xd = drop(x) and norm[n] = ‖W[n] + c·B[n]·A‖, a constant to autograd:
    s = xd·Aᵀ                            [M, R]
    z = xd·Wᵀ + c·s·Bᵀ                   [M, N]
    y = m̂ ∘ z + (x − xd)·Wᵀ + bias       the same as PEFT's
        x·Wᵀ + bias + (m̂ − 1) ∘ (xd·Wᵀ) + m̂ ∘ (c·s·Bᵀ); without dropout x − xd = 0

Norm: norm² = ‖W[n]‖² + 2c·⟨B[n], (W·Aᵀ)[n]⟩ + c²·B[n]·(A·Aᵀ)·B[n]ᵀ, so that W + c·B·A is never
made but for rows in which the terms nearly cancel. ‖W‖² is computed at each call, as no cheap test
tells that W is what it was (`.data` and fused optimisers change it unseen); who knows that it is
passes `weight_norm_squared`. It is the norm of W as it is stored: of a 4-bit weight decoded in
fp32, of a dense one before autocast.

Backward, with dy = ∂L/∂y and dz = m̂ ∘ dy:
    ds         = c · dz·B                          [M, R]
    dx         = dy·W + drop'((dz − dy)·W + ds·A)  drop' is the forward's mask and factor again;
                                                   without dropout dz·W + ds·A
    dA         = dsᵀ·xd
    dB         = c · dzᵀ·s
    dmagnitude = (Σ_m dy ∘ z) / norm
    dbias      = Σ_m dy
    dW         = dzᵀ·xd + dyᵀ·(x − xd)   (dense base, only if it requires grad; norm a constant)

A row with norm 0 has no direction. There m̂ = 1 and dmagnitude = 0: all is finite, and the row
learns as in plain LoRA until it has a norm. (m̂ = 0 would leave a layer of zeros dead for ever.)

Saved: x, s, the norm [N], the parameters themselves, and if the magnitude requires a gradient:
    without dropout and bias   y, the output, which the next operation often keeps anyway:
                               dmagnitude = Σ_m dy ∘ y / magnitude. Where m̂ is 0 or tiny, y holds
                               nothing of z; a backend makes z again for such a call (a native one
                               on the CPU, where to look at m̂ is free; a GPU kernel can branch
                               inside its tile, so neither waits for the device).
    otherwise                  z, M·N elements of x's dtype. With a bias, y − bias would have lost
                               the digits of z that the bias covers: biases of 100 and more are
                               usual in 16 bits (Qwen), and the budget would not hold.
The mask is made again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.scale import Scale, as_scale, scaled_op
from lora_kernels.ops.dora.magnitude import base_of, norm_dtype
from lora_kernels.ops.dora.schema import check_dora_linear, check_norm_sq
from lora_kernels.ops.lora.api import draw_seed
from lora_kernels.ops.nf4.weight import NF4Weight


class DoRALinearFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norm: Tensor,
        seed: Tensor | None,
        scale: Scale,
        dropout_p: float,
        meta: list[int],
        *base: Tensor,
    ) -> Tensor:
        from_output = bias is None and seed is None
        learns = magnitude.requires_grad
        y, s, z = scaled_op("dora_linear_fwd", scale)(
            *(x, list(base), meta, a, b, scale, magnitude, norm, bias, dropout_p, seed),
            learns and not from_output,
        )
        kept = None if not learns else y if from_output else z
        ctx.save_for_backward(x, s, a, b, magnitude, norm, seed, kept, *base)
        ctx.scale, ctx.dropout_p, ctx.meta, ctx.from_output = scale, dropout_p, meta, from_output
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, a, b, magnitude, norm, seed, kept, *base = ctx.saved_tensors
        y, z = (kept, None) if ctx.from_output else (None, kept)
        asked = ctx.needs_input_grad
        needs = [*asked[:5], len(base) == 1 and asked[10]]
        grads = scaled_op("dora_linear_bwd", ctx.scale)(
            *(to_rows(dy), x, s, base, ctx.meta, a, b, ctx.scale, magnitude, norm),
            *(ctx.dropout_p, seed, y, z, needs),
        )
        *inputs, dw = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*inputs, None, None, None, None, None, dw, *(None for _ in base[1:]))


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    weight_norm_sq: Tensor | None = None,
) -> Tensor:
    """y = magnitude / ‖W + scale·B·A‖ ∘ (x·Wᵀ + scale·x·Aᵀ·Bᵀ) + bias (Liu et al., 2024, "DoRA").

    The norm is each output row's, a constant to autograd. Differentiable in x, A, B, magnitude,
    bias and a dense weight, and only what requires a gradient is computed. With dropout,
    y = x·Wᵀ + (m̂ − 1) ∘ (drop(x)·Wᵀ) + m̂ ∘ (scale·drop(x)·Aᵀ·Bᵀ) + bias, as in PEFT. A row whose
    norm is 0 has m̂ = 1. Under autocast x, weight and bias are cast; the others stay as they are.

    Between forward and backward x and s [M, R] are kept, and for the magnitude's gradient y itself,
    so y must not be changed in place before the backward; with a bias or dropout another M·N
    elements of x's dtype instead.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        weight: W [N, K] in x's dtype, or an `NF4Weight`, which is decoded to x's dtype.
        lora_a: A [R, K]; x's dtype or any other floating one, gradients come in it.
        lora_b: B [N, R] in A's dtype.
        magnitude: [N] in any floating dtype, fp32 as a rule.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: [N] in x's dtype.
        dropout_p: probability that an element of the branch's input is dropped.
        seed: as in `lora_linear`, and for the same seed the same mask.
        weight_norm_sq: `weight_norm_squared(weight)`, [N]; None computes it, which reads all of W.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: a shape, a device or dropout_p does not fit.
        TypeError: a dtype does not fit.
    """
    try:
        stored, meta = base_of(weight)
        if isinstance(weight, NF4Weight):
            base = stored
            x, bias = autocast(x, bias)
        else:
            x, dense, bias = autocast(x, weight, bias)
            base = [dense]
        check_dora_linear(x, base, meta, lora_a, lora_b, magnitude, bias, dropout_p, seed)
        factor = as_scale(scale)
        norm = _norm(stored, meta, lora_a, lora_b, factor, weight_norm_sq)
        if threshold(dropout_p) == 0:
            seed = None
        elif seed is None:
            seed = draw_seed(x.device)
        rows = to_rows(x)
        if needs_grad(x, lora_a, lora_b, magnitude, bias, base[0] if len(base) == 1 else None):
            y = DoRALinearFunction.apply(
                rows, lora_a, lora_b, magnitude, bias, norm, seed, factor, dropout_p, meta, *base
            )
        else:
            y, _, _ = scaled_op("dora_linear_fwd", factor)(
                *(rows, base, meta, lora_a, lora_b, factor, magnitude, norm, bias, dropout_p, seed),
                False,
            )
        return from_rows(y, x)
    except Exception:
        check_kinds(dora_linear, locals())
        raise


def dora_norm(
    weight: Tensor | NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    weight_norm_sq: Tensor | None = None,
) -> Tensor:
    """‖W + scale·B·A‖ of every row: a new adapter's magnitude, and what `dora_linear` divides by.

    Args:
        weight, lora_a, lora_b, scale, weight_norm_sq: as in `dora_linear`.

    Returns:
        [N] in fp32; fp64 for an fp64 weight. Never differentiable.
    """
    try:
        return _norm(*base_of(weight), lora_a, lora_b, as_scale(scale), weight_norm_sq)
    except Exception:
        check_kinds(dora_norm, locals())
        raise


def _norm(
    base: Sequence[Tensor],
    meta: list[int],
    a: Tensor,
    b: Tensor,
    scale: Scale,
    weight_norm_sq: Tensor | None,
) -> Tensor:
    check_norm_sq(weight_norm_sq, meta, norm_dtype(base), a.device)
    with torch.no_grad():
        return scaled_op("dora_norm", scale)(weight_norm_sq, base, meta, a, b, scale)
