"""y_i = x·W_iᵀ + scale_i·s_i·B_iᵀ + bias_i with s_i = drop_i(x)·A_iᵀ, for several i at once.

q, k and v of an attention layer, or gate and up of an MLP, read one input: they share one saved x,
one seed and one dx. Each has a mask of its own, as in PEFT: stream i of the seed.

Backward, with dy_i = ∂L/∂y_i and ds_i = scale_i·dy_i·B_i [M, r_i]:
    dx      = Σ_i (dy_i·W_i + drop_i'(ds_i·A_i))     drop_i' is the forward's mask and factor again
    dA_i    = ds_iᵀ·drop_i(x)
    dB_i    = scale_i·dy_iᵀ·s_i
    dbias_i = Σ_m dy_i;  dW_i = dy_iᵀ·x (dense base, only if it requires grad)
Saved: x, s = [s_0, s_1, ...] side by side and the seed (and the parameters themselves).

Source: Hu et al., 2021, "LoRA"; Dettmers et al., 2023, "QLoRA".
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
from lora_kernels.ops.common.scale import as_scales, run_scaled
from lora_kernels.ops.lora.api import draw_seed
from lora_kernels.ops.nf4.weight import NF4Weight
from lora_kernels.ops.packed.schema import META, LoRAPackedForward, pack_needs, split_base


def packed_fwd(c: LoRAPackedForward) -> tuple[Sequence[Tensor], Tensor]:
    """The op on all projections. `torch.jit.trace` takes no list of optional tensors: there the op
    on one projection runs for each of them, with the same result."""
    if not torch.jit.is_tracing():
        return run_scaled("lora_packed_fwd", c)
    parts = [
        torch.ops.lora_kernels.lora_linear_fwd(*c.one(i, w, m))
        for i, (w, m, _) in enumerate(split_base(c.base, c.meta))
    ]
    y, s = zip(*parts, strict=True)
    return y, torch.cat(s, dim=1)


_FIELDS = Fields(LoRAPackedForward)


class LoRAPackedFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], *values: Any) -> tuple[Tensor, ...]:
        c = _FIELDS.gathered(counts, values)
        y, s = packed_fwd(c)
        _FIELDS.keep(ctx, counts, values, s, without=c.bias)
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        c, (s,) = _FIELDS.kept(ctx)
        asked = _FIELDS.asked(ctx)
        want = (asked.a, asked.b, asked.bias, of_weights(asked.base, c.meta))
        needs = pack_needs(asked.x, *want)
        grads = run_scaled("lora_packed_bwd", c.backward([to_rows(t) for t in dy], s, needs))
        dx = grads[0] if asked.x else None
        return _FIELDS.grads(x=dx, **by_field(grads[1:], want, c.base, c.meta))


def of_weights(flags: Sequence[bool], meta: Sequence[int]) -> list[bool]:
    """Which weights need a gradient, given a flag for each base tensor. A 4-bit weight never
    does."""
    parts = split_base(flags, meta)
    return [len(part) == 1 and part[0] for part, _, _ in parts]


def by_field(
    grads: Sequence[Sequence[Tensor]],
    want: Sequence[Sequence[bool]],
    base: Sequence[Tensor],
    meta: Sequence[int],
) -> dict[str, list[Tensor | None]]:
    """The lists da, db, dbias and dw as gradients of a call's fields, None where not asked."""
    a, b, bias, weights = (
        [t if flag else None for t, flag in zip(given, flags, strict=True)]
        for given, flags in zip(grads, want, strict=True)
    )
    into: list[Tensor | None] = []
    for dw, (part, _, _) in zip(weights, split_base(base, meta), strict=True):
        into += [dw, *[None] * (len(part) - 1)]
    return {"a": a, "b": b, "bias": bias, "base": into}


def gather(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None,
    dropout_p: float,
    seed: Tensor | None,
) -> LoRAPackedForward:
    """The call, cast where autocast is on. Checks numbers and kinds of the entries."""
    p = len(weights)
    if p == 0:
        raise ValueError("weights: got no entry, expected one or more")
    biases = [None] * p if biases is None else biases
    for name, values in (
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("scales", scales),
        ("biases", biases),
    ):
        if len(values) != p:
            raise ValueError(f"{name}: got {len(values)} entries, expected {p} as weights has")
    for name, tensors in (("lora_a", lora_a), ("lora_b", lora_b)):
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}]: got {type(t).__name__}, expected a Tensor")
    dense = [w for w in weights if isinstance(w, Tensor)]
    x, *cast = autocast(x, *dense, *biases)
    # Lists also under the torch.compile of 2.10, which unpacks into a tuple.
    dense, bias = list(cast[: len(dense)]), list(cast[len(dense) :])
    base: list[Tensor] = []
    meta: list[int] = []
    for i, w in enumerate(weights):
        if isinstance(w, NF4Weight):
            base += _checked(i, w).base
            meta += w.meta
        elif isinstance(w, Tensor):
            if w.dim() != 2:
                raise ValueError(f"weights[{i}]: got shape {list(w.shape)}, expected [N, K]")
            base.append(dense.pop(0))
            meta += [w.shape[0], w.shape[1], *[0] * (META - 2)]
        else:
            raise TypeError(
                f"weights[{i}]: got {type(w).__name__}, expected a Tensor or an NF4Weight"
            )
    factors = as_scales(scales)
    return LoRAPackedForward(
        x, base, meta, list(lora_a), list(lora_b), factors, bias, dropout_p, seed
    )


def _checked(i: int, weight: NF4Weight) -> NF4Weight:
    try:
        return weight.check()
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights[{i}]: {error}") from error


def ready(c: LoRAPackedForward) -> LoRAPackedForward:
    """The call with x as rows, and with the seed that it needs: none without dropout, a fresh one
    where none was given."""
    seed = c.seed
    if threshold(c.dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(c.x.device)
    return c._replace(x=to_rows(c.x), seed=seed)


def wants_grad(c: LoRAPackedForward) -> bool:
    """Whether the call needs a gradient."""
    parts = (part for part, _, _ in split_base(c.base, c.meta))
    return needs_grad(c.x, *c.a, *c.b, *c.bias, *(p[0] for p in parts if len(p) == 1))


def lora_packed_linear(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Several LoRA projections of one x: y_i = x·W_iᵀ + scale_i·drop_i(x)·A_iᵀ·B_iᵀ + bias_i.

    Equal to one `lora_linear` or `nf4_lora_linear` for each, projection i dropping by stream i of
    the seed. Differentiable in every tensor, and only what requires a gradient is computed. Between
    forward and backward x (once) and s [M, Σ r_i] are kept, nothing else. Under autocast x, dense
    weights and biases are cast; the adapters stay as they are.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        weights: W_i [N_i, K], each a tensor in x's dtype or an `NF4Weight`; kinds may be mixed.
        lora_a: A_i [r_i, K], all of one floating dtype, x's or another (fp32 adapters under 16-bit
            x are the usual case); gradients come in it.
        lora_b: B_i [N_i, r_i] in A's dtype.
        scales: alpha_i / r_i, or alpha_i / sqrt(r_i) for rsLoRA.
        biases: [N_i] in x's dtype or None, for each; None: no bias at all.
        dropout_p: probability that an element of a branch's input is dropped.
        seed: the masks' int64 seed [1] on x's device; None draws one from that device's default
            generator when dropout_p > 0.

    Returns:
        [..., N_i] in x's dtype for each projection.

    Raises:
        ValueError: a number of entries, a shape, a device or dropout_p does not fit.
        TypeError: a dtype or the kind of an entry does not fit.

    Source: Hu et al., 2021, "LoRA"; Dettmers et al., 2023, "QLoRA".

    Examples:
        >>> x, r = torch.randn(3, 64), 8
        >>> weights = [torch.randn(64, 64), torch.randn(16, 64), torch.randn(16, 64)]
        >>> a = [torch.randn(r, 64) for _ in weights]
        >>> b = [torch.randn(w.shape[0], r) for w in weights]
        >>> q, k, v = lk.functional.lora_packed_linear(x, weights, a, b, scales=[2.0] * 3)
        >>> q.shape, k.shape
        (torch.Size([3, 64]), torch.Size([3, 16]))
    """
    try:
        c = gather(x, weights, lora_a, lora_b, scales, biases, dropout_p, seed)
        c.check([c.x.shape[-1] if c.x.dim() else 0] * len(c.a))
        rows = ready(c)
        if wants_grad(rows):
            y = LoRAPackedFunction.apply(_FIELDS.counts(rows), *_FIELDS.spread(rows))
        else:
            y, _ = packed_fwd(rows)
        return tuple(from_rows(t, c.x) for t in y)
    except Exception:
        check_kinds(lora_packed_linear, locals())
        raise
