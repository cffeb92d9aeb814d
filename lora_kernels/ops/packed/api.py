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
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.scale import Scale, as_scales, scaled_op
from lora_kernels.ops.lora.api import draw_seed
from lora_kernels.ops.nf4.weight import NF4Weight
from lora_kernels.ops.packed.schema import (
    META,
    check_inputs,
    check_projection,
    pack_needs,
    split_base,
)

T = TypeVar("T")


def packed_fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[Scale],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Sequence[Tensor], Tensor]:
    """The op; for `torch.jit.trace`, which takes no list of optional tensors, that of one
    projection for each of them, with the same result."""
    if not torch.jit.is_tracing():
        return scaled_op("lora_packed_fwd", scales)(
            x, base, meta, a, b, scales, bias, dropout_p, seed
        )
    parts = [
        torch.ops.lora_kernels.lora_linear_fwd(
            *(x, w, m, a[i], b[i], scales[i], bias[i], dropout_p, seed, None, None, i)
        )
        for i, (w, m, _) in enumerate(split_base(base, meta))
    ]
    y, s = zip(*parts, strict=True)
    return y, torch.cat(s, dim=1)


class LoRAPackedFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        dropout_p: float,
        scales: list[Scale],
        meta: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        a, b, bias, base = by_kind(tensors, len(scales))
        y, s = packed_fwd(x, base, meta, a, b, scales, bias, dropout_p, seed)
        ctx.save_for_backward(x, s, seed, *a, *b, *base)
        ctx.dropout_p, ctx.scales, ctx.meta = dropout_p, scales, meta
        return tuple(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, seed, *parameters = ctx.saved_tensors
        p = len(ctx.scales)
        a, b, base = parameters[:p], parameters[p : 2 * p], parameters[2 * p :]
        asked = ctx.needs_input_grad
        want = by_kind(asked[5:], p)
        grads = scaled_op("lora_packed_bwd", ctx.scales)(
            [to_rows(t) for t in dy],
            x,
            s,
            base,
            ctx.meta,
            a,
            b,
            ctx.scales,
            ctx.dropout_p,
            seed,
            pack_needs(asked[0], *want[:3], of_weights(want[3], ctx.meta)),
        )
        dx = grads[0] if asked[0] else None
        return (dx, *[None] * 4, *kept(grads[1:], want, ctx.meta))


def by_kind(values: Sequence[T], projections: int) -> tuple[list[T], list[T], list[T], list[T]]:
    """a, b, bias and base out of the functions' flat arguments (or of their gradients' flags)."""
    p = projections
    return (
        list(values[:p]),
        list(values[p : 2 * p]),
        list(values[2 * p : 3 * p]),
        list(values[3 * p :]),
    )


def of_weights(flags: Sequence[bool], meta: Sequence[int]) -> list[bool]:
    """Which weights need a gradient, of flags for each base tensor; a 4-bit one never does."""
    parts = split_base(flags, meta)
    return [len(part) == 1 and part[0] for part, _, _ in parts]


def kept(
    grads: Sequence[Sequence[Tensor]], want: Sequence[Sequence[bool]], meta: Sequence[int]
) -> list[Tensor | None]:
    """The lists da, db, dbias and dw as gradients of the flat tensors, None where not asked."""
    *adapters, dw = grads
    result: list[Tensor | None] = []
    for given, flags in zip(adapters, want[:3], strict=True):
        result += [t if flag else None for t, flag in zip(given, flags, strict=True)]
    for t, (part, _, _) in zip(dw, split_base(want[3], meta), strict=True):
        result += [t] if len(part) == 1 and part[0] else [None] * len(part)
    return result


class Projections(NamedTuple):
    """The projections' arguments as the ops take them (`schema.py` says how)."""

    a: list[Tensor]
    b: list[Tensor]
    bias: list[Tensor | None]
    base: list[Tensor]
    meta: list[int]
    scales: list[Scale]

    def tensors(self) -> list[Tensor | None]:
        """What the autograd functions take; `by_kind` takes it apart. (No property: the
        torch.compile of 2.10 reads none of a named tuple.)"""
        return [*self.a, *self.b, *self.bias, *self.base]

    def need_grad(self, x: Tensor) -> bool:
        dense = [
            t for part, _, _ in split_base(self.base, self.meta) if len(part) == 1 for t in part
        ]
        return needs_grad(x, *self.a, *self.b, *self.bias, *dense)

    def check(self, i: int, x: Tensor, k: int) -> None:
        """Raise unless projection i fits an input of width k with x's dtype and device."""
        base, meta, _ = split_base(self.base, self.meta)[i]
        check_projection(i, x, k, base, meta, self.a[i], self.b[i], self.bias[i], self.a[0].dtype)


def gather(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None,
) -> tuple[Tensor, Projections]:
    """x and the projections, cast where autocast is on. Checks numbers and kinds of the entries."""
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
    return x, Projections(list(lora_a), list(lora_b), bias, base, meta, as_scales(scales))


def _checked(i: int, weight: NF4Weight) -> NF4Weight:
    try:
        return weight.check()
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights[{i}]: {error}") from error


def seed_for(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The seed of this call: none without dropout, a fresh one where none was given."""
    if threshold(dropout_p) == 0:
        return None
    return draw_seed(x.device) if seed is None else seed


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
    """
    try:
        x, p = gather(x, weights, lora_a, lora_b, scales, biases)
        check_inputs(x, dropout_p, seed)
        for i in range(len(p.a)):
            p.check(i, x, x.shape[-1])
        seed = seed_for(x, dropout_p, seed)
        rows = to_rows(x)
        if p.need_grad(x):
            y = LoRAPackedFunction.apply(rows, seed, dropout_p, p.scales, p.meta, *p.tensors())
        else:
            y, _ = packed_fwd(rows, p.base, p.meta, p.a, p.b, p.scales, p.bias, dropout_p, seed)
        return tuple(from_rows(t, x) for t in y)
    except Exception:
        check_kinds(lora_packed_linear, locals())
        raise
