"""DoRA: y = m̂ ∘ (x·Wᵀ + scale·x·Aᵀ·Bᵀ) + bias with m̂ = magnitude / ‖W + scale·B·A‖, row by row.

Source: Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation"; the norm gets no gradient
(its section 4.3), and dropout acts as in PEFT.

With c = scale, xd = drop(x) and norm[n] = ‖W[n] + c·B[n]·A‖, a constant to autograd:
    s = xd·Aᵀ                            [M, R]
    z = xd·Wᵀ + c·s·Bᵀ                   [M, N]
    u = z / norm                         [M, N]
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
    dmagnitude = Σ_m dy ∘ u
    dbias      = Σ_m dy
    dW         = dzᵀ·xd + dyᵀ·(x − xd)   (dense base, only if it requires grad; norm a constant)

A row with norm 0 has no direction. There m̂ = 1 and u = dmagnitude = 0: all is finite, and the row
learns as in plain LoRA until it has a norm. (m̂ = 0 would leave a layer of zeros dead for ever.)

Saved: x, s, the norm [N], the parameters themselves, and if the magnitude requires a gradient u,
M·N elements of x's dtype. The mask is made again from its seed. Why u, and nothing cheaper:
    z          may be beyond fp16's largest number where y is not; |u| is at most the length of xd.
    y          is the caller's, who may write over it (`relu_`, `+=`). It would cost no memory where
               the next operation keeps it (v, gate and up of a transformer, not q, k, o and down),
               but it lacks what a small m̂ or a large bias takes from u.
    nothing    norm ∘ dmagnitude = ⟨W[n], (dyᵀ·xd)[n]⟩ + c·⟨B[n], (dyᵀ·s)[n]⟩, or z made again:
               2·M·N·K FLOPs, as many as the forward's, against one M·N store and one read. Who
               lacks the memory has checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.fields import Fields
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.scale import as_scale, run_scaled
from lora_kernels.ops.dora.magnitude import base_of, norm_dtype
from lora_kernels.ops.dora.schema import (
    DoRALinearForward,
    DoRANorm,
    check_magnitude,
    check_norm_sq,
)
from lora_kernels.ops.lora.api import draw_seed
from lora_kernels.ops.lora.schema import LoRALinearForward
from lora_kernels.ops.nf4.weight import NF4Weight

_FIELDS = Fields(DoRALinearForward)


class DoRALinearFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], *values: Any) -> Tensor:
        c = _FIELDS.gathered(counts, values)
        c = c._replace(keep_u=c.magnitude.requires_grad)
        y, s, u = run_scaled("dora_linear_fwd", c)
        _FIELDS.keep(ctx, counts, values, s, *([u] if c.keep_u else []), without=[c.bias])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        c, (s, *u) = _FIELDS.kept(ctx)
        asked = _FIELDS.asked(ctx)
        needs = [asked.x, asked.a, asked.b, asked.magnitude, asked.bias]
        needs.append(len(c.base) == 1 and asked.base[0])
        call = c.backward(to_rows(dy), s, u[0] if u else None, needs)
        grads = run_scaled("dora_linear_bwd", call)
        made = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        dx, da, db, dmagnitude, dbias, dw = made
        base = [dw, *[None] * (len(c.base) - 1)]
        return _FIELDS.grads(x=dx, a=da, b=db, magnitude=dmagnitude, bias=dbias, base=base)


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

    Between forward and backward x and s [M, R] are kept, and for the magnitude's gradient M·N
    elements of x's dtype.

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

    Examples:
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a, b = torch.randn(8, 64), torch.zeros(32, 8)
        >>> magnitude = weight.norm(dim=1)  # with B = 0: what the base computes
        >>> y = lk.functional.dora_linear(x, weight, a, b, magnitude, scale=2.0)
        >>> y.shape
        torch.Size([3, 32])
    """
    try:
        stored, meta = base_of(weight)
        if isinstance(weight, NF4Weight):
            base = stored
            x, bias = autocast(x, bias)
        else:
            x, dense, bias = autocast(x, weight, bias)
            base = [dense]
        factor = as_scale(scale)
        of_lora = LoRALinearForward(
            x, base, meta, lora_a, lora_b, factor, bias, dropout_p, seed, None, None
        )
        of_lora.check()
        check_magnitude(magnitude, meta, x.device)
        norm = _norm(stored, meta, lora_a, lora_b, factor, weight_norm_sq)
        if threshold(dropout_p) == 0:
            seed = None
        elif seed is None:
            seed = draw_seed(x.device)
        c = DoRALinearForward(
            *(to_rows(x), base, meta, lora_a, lora_b, factor, magnitude, norm, bias, dropout_p),
            seed,
            keep_u=False,
        )
        if needs_grad(x, lora_a, lora_b, magnitude, bias, base[0] if len(base) == 1 else None):
            y = DoRALinearFunction.apply(_FIELDS.counts(c), *_FIELDS.spread(c))
        else:
            y, _, _ = run_scaled("dora_linear_fwd", c)
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
    scale: Any,
    weight_norm_sq: Tensor | None,
) -> Tensor:
    check_norm_sq(weight_norm_sq, meta, norm_dtype(base), a.device)
    with torch.no_grad():
        return run_scaled("dora_norm", DoRANorm(weight_norm_sq, base, meta, a, b, scale))
