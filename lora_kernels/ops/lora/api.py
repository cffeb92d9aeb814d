"""y = x·Wᵀ + g ∘ (scale·(d ∘ s)·Bᵀ) + bias with s = drop(x)·Aᵀ, over a dense or a 4-bit W.

Source: Hu et al., 2021, "LoRA"; Dettmers et al., 2023, "QLoRA"; d and g are the diagonals of
AdaLoRA (Zhang et al., 2023) and VeRA (Kopiczko et al., 2024).

Backward, with dy = ∂L/∂y, c = scale and G = dyᵀ·s [N, R] (the one product that dB and both
diagonals share):
    ds         = c · d ∘ ((g ∘ dy)·B)          [M, R], gradient of s
    dx         = dy·W + drop'(ds·A)            drop' is the forward's mask and factor again
    dA         = dsᵀ·drop(x)
    dB         = c · g ∘ G ∘ d                 g over rows, d over columns
    drank_diag = c · Σ_n g[n]·B[n, :]·G[n, :]
    dout_diag  = c · Σ_r d[r]·B[:, r]·G[:, r]
    dbias      = Σ_m dy;  dW = dyᵀ·x (dense base, only if it requires grad)
Saved: x and s (and the parameters themselves). The mask is made again from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.checks import check_dtype, check_shape
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.philox import check_dropout, threshold
from lora_kernels.ops.common.scale import Scale, as_scale, scaled_op
from lora_kernels.ops.lora.schema import check_lora_linear
from lora_kernels.ops.nf4.weight import NF4Weight


class LoRALinearFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        rank_diag: Tensor | None,
        out_diag: Tensor | None,
        seed: Tensor | None,
        scale: Scale,
        dropout_p: float,
        meta: list[int],
        *base: Tensor,
    ) -> Tensor:
        y, s = scaled_op("lora_linear_fwd", scale)(
            x, list(base), meta, a, b, scale, bias, dropout_p, seed, rank_diag, out_diag
        )
        ctx.save_for_backward(x, s, a, b, seed, rank_diag, out_diag, *base)
        ctx.scale, ctx.dropout_p, ctx.meta = scale, dropout_p, meta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, a, b, seed, rank_diag, out_diag, *base = ctx.saved_tensors
        asked = ctx.needs_input_grad
        needs = [*asked[:6], len(base) == 1 and asked[10]]
        grads = scaled_op("lora_linear_bwd", ctx.scale)(
            to_rows(dy),
            x,
            s,
            base,
            ctx.meta,
            a,
            b,
            ctx.scale,
            ctx.dropout_p,
            seed,
            rank_diag,
            out_diag,
            needs,
        )
        *inputs, dw = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return (*inputs, None, None, None, None, dw, *(None for _ in base[1:]))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rank_diag: Tensor | None = None,
    out_diag: Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + out_diag ∘ (scale·(rank_diag ∘ drop(x)·Aᵀ)·Bᵀ) + bias.

    Differentiable in every tensor, and only what requires a gradient is computed. Between forward
    and backward x and s [M, R] are kept, nothing else. Under autocast x, weight and bias are cast;
    the adapters stay as they are.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        weight: W [N, K] in x's dtype.
        lora_a: A [R, K]; x's dtype or any other floating one (fp32 adapters under 16-bit x are
            the usual case), gradients come in it.
        lora_b: B [N, R] in A's dtype.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        bias: [N] in x's dtype.
        dropout_p: probability that an element of the branch's input is dropped.
        seed: the mask's int64 seed [1] on x's device; None draws one from that device's default
            generator when dropout_p > 0. The same seed gives the same mask on every backend.
        rank_diag: d [R].
        out_diag: g [N].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: a shape, a device or dropout_p does not fit.
        TypeError: a dtype does not fit.
    """
    try:
        if weight.dim() != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K]")
        x, weight, bias = autocast(x, weight, bias)
        meta = [weight.shape[0], weight.shape[-1]]
        return _apply(
            x, [weight], meta, lora_a, lora_b, scale, bias, dropout_p, seed, rank_diag, out_diag
        )
    except Exception:
        check_kinds(lora_linear, locals())
        raise


def nf4_lora_linear(
    x: Tensor,
    qweight: NF4Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rank_diag: Tensor | None = None,
    out_diag: Tensor | None = None,
) -> Tensor:
    """`lora_linear` over a frozen 4-bit weight (QLoRA); W is decoded to x's dtype.

    Args:
        qweight: W [N, K] as an `NF4Weight`.

    The other arguments, the result and the errors are those of `lora_linear`.
    """
    try:
        x, bias = autocast(x, bias)
        return _apply(
            x,
            qweight.check().base,
            qweight.meta,
            lora_a,
            lora_b,
            scale,
            bias,
            dropout_p,
            seed,
            rank_diag,
            out_diag,
        )
    except Exception:
        check_kinds(nf4_lora_linear, locals())
        raise


def _apply(
    x: Tensor,
    base: Sequence[Tensor],
    meta: list[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
) -> Tensor:
    check_lora_linear(x, base, meta, a, b, bias, dropout_p, seed, rank_diag, out_diag)
    if threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    rows, factor = to_rows(x), as_scale(scale)
    if needs_grad(x, a, b, bias, rank_diag, out_diag, base[0] if len(base) == 1 else None):
        y = LoRALinearFunction.apply(
            rows, a, b, bias, rank_diag, out_diag, seed, factor, dropout_p, meta, *base
        )
    else:
        y, _ = scaled_op("lora_linear_fwd", factor)(
            rows, base, meta, a, b, factor, bias, dropout_p, seed, rank_diag, out_diag
        )
    return from_rows(y, x)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A seed [1] from the device's default generator, so that checkpointing replays it; or from
    another of that device."""
    return torch.randint(0, 2**63 - 1, (1,), generator=generator, dtype=torch.int64, device=device)


def dropout_mask(shape: Sequence[int], p: float, seed: Tensor | int, stream: int = 0) -> Tensor:
    """The boolean keep mask that every backend applies for this seed.

    Args:
        shape: [..., K]; the leading dimensions count rows.
        p: probability that an element is dropped, in steps of 2**-16.
        seed: int64 [1], or an integer (then the mask is made on the CPU).
        stream: which projection of a packed layer.

    Returns:
        bool tensor of `shape`, True where kept. Kept inputs are scaled by
        1 / (1 - round(65536 p) / 65536).

    Raises:
        ValueError: p is outside [0, 1), shape is empty or stream is negative.
    """
    try:
        check_dropout(p)
        if len(shape) == 0:
            raise ValueError("shape: got no dimension, expected [..., K]")
        if any(n < 0 for n in shape):
            raise ValueError(f"shape: got {list(shape)}, expected sizes of 0 or more")
        if not 0 <= stream < 2**32:
            raise ValueError(f"stream: got {stream}, expected 0 <= stream < 2**32")
        if isinstance(seed, int):
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"seed: got {seed}, expected a 64-bit integer")
            seed = torch.tensor([seed], dtype=torch.int64)
        check_dtype("seed", seed, [torch.int64])
        check_shape("seed", seed, [1])
        rows = torch.Size(shape[:-1]).numel()
        mask = torch.ops.lora_kernels.dropout_mask(seed, rows, shape[-1], p, stream)
        return mask.view(*shape)
    except Exception:
        check_kinds(dropout_mask, locals())
        raise
