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

from lora_kernels.dispatch.registry import run
from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.checks import check_dtype, check_shape
from lora_kernels.ops.common.fields import Fields
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.philox import check_dropout, threshold
from lora_kernels.ops.common.scale import as_scale, run_scaled
from lora_kernels.ops.lora.graph import lora_linear_in_graph
from lora_kernels.ops.lora.schema import DropoutMask, LoRALinearForward
from lora_kernels.ops.lora.short import short
from lora_kernels.ops.nf4.weight import NF4Weight

_FIELDS = Fields(LoRALinearForward)


class LoRALinearFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], *values: Any) -> Tensor:
        c = _FIELDS.gathered(counts, values)
        y, s = run_scaled("lora_linear_fwd", c)
        _FIELDS.keep(ctx, counts, values, s, without=[c.bias])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        c, (s,) = _FIELDS.kept(ctx)
        asked = _FIELDS.asked(ctx)
        needs = [asked.x, asked.a, asked.b, asked.bias, asked.rank_diag, asked.out_diag]
        needs.append(len(c.base) == 1 and asked.base[0])
        grads = run_scaled("lora_linear_bwd", c.backward(to_rows(dy), s, needs))
        made = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        dx, da, db, dbias, drank, dout, dw = made
        base = [dw, *[None] * (len(c.base) - 1)]
        return _FIELDS.grads(
            x=dx, a=da, b=db, bias=dbias, rank_diag=drank, out_diag=dout, base=base
        )


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

    Examples:
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> a = torch.randn(8, 64, requires_grad=True)
        >>> b = torch.zeros(32, 8, requires_grad=True)
        >>> y = lk.functional.lora_linear(x, weight, a, b, scale=2.0, dropout_p=0.05)
        >>> y.sum().backward()
        >>> y.shape, b.grad.shape
        (torch.Size([3, 32]), torch.Size([32, 8]))
    """
    try:
        if weight.dim() != 2:
            raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K]")
        meta = [*weight.shape]
        if out_diag is None:
            y = short(x, [weight], meta, lora_a, lora_b, scale, bias, dropout_p, seed, rank_diag)
            if y is not None:
                return y
        x, weight, bias = autocast(x, weight, bias)
        return _run(
            LoRALinearForward(
                x,
                [weight],
                meta,
                lora_a,
                lora_b,
                as_scale(scale),
                bias,
                dropout_p,
                seed,
                rank_diag,
                out_diag,
            ),
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

    Examples:
        >>> weight = lk.NF4Weight.quantize(torch.randn(32, 64))
        >>> x, a, b = torch.randn(3, 64), torch.randn(8, 64), torch.randn(32, 8)
        >>> lk.functional.nf4_lora_linear(x, weight, a, b, scale=2.0).shape
        torch.Size([3, 32])
    """
    try:
        base, meta = qweight.check().base, qweight.meta
        if out_diag is None:
            y = short(x, base, meta, lora_a, lora_b, scale, bias, dropout_p, seed, rank_diag)
            if y is not None:
                return y
        x, bias = autocast(x, bias)
        return _run(
            LoRALinearForward(
                x,
                base,
                meta,
                lora_a,
                lora_b,
                as_scale(scale),
                bias,
                dropout_p,
                seed,
                rank_diag,
                out_diag,
            ),
        )
    except Exception:
        check_kinds(nf4_lora_linear, locals())
        raise


def _run(c: LoRALinearForward) -> Tensor:
    """The call whose x is as the user gave it."""
    c.check()
    x, seed = c.x, c.seed
    if threshold(c.dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    dense = c.base[0] if len(c.base) == 1 else None
    trained = needs_grad(x, c.a, c.b, c.bias, c.rank_diag, c.out_diag, dense)
    if not trained and seed is None and c.rank_diag is None and c.out_diag is None:
        y = lora_linear_in_graph(c)
        if y is not None:
            return y
    c = c._replace(x=to_rows(x), seed=seed)
    if trained:
        y = LoRALinearFunction.apply(_FIELDS.counts(c), *_FIELDS.spread(c))
    else:
        y, _ = run_scaled("lora_linear_fwd", c)
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

    Examples:
        >>> mask = lk.functional.dropout_mask([2, 64], p=0.5, seed=7)
        >>> mask.shape, mask.dtype
        (torch.Size([2, 64]), torch.bool)
        >>> torch.equal(mask, lk.functional.dropout_mask([2, 64], p=0.5, seed=7))
        True
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
        mask = run("dropout_mask", DropoutMask(seed, rows, shape[-1], p, stream))
        return mask.view(*shape)
    except Exception:
        check_kinds(dropout_mask, locals())
        raise
