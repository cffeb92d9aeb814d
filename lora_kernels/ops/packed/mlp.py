"""y = down(act(gate(x)) * up(x)), each of the three a LoRA projection.

With g = gate(x), u = up(x) [M, I] and h = act(g) * u; `ops/lora/api.py` and `ops/packed/api.py`
derive the projections, `ops/glu/api.py` the gate.

Backward, with dy = ∂L/∂y:
    dh               from dy through down
    dg, du, h        from dh, g and u, in one elementwise pass
    dA_down          from dy and h; ds_down = scale·dy·B_down [M, r] is thin and made again for it
    dx and the rest  from dg and du through gate and up
Saved: x, s of gate and up, g, u, s of down and the seed (and the parameters themselves); h is made
again from g and u.

Source: Shazeer, 2020, "GLU Variants Improve Transformer"; Hu et al., 2021, "LoRA".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import from_rows, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.scale import Scale, scaled_op
from lora_kernels.ops.glu.schema import activation_index
from lora_kernels.ops.nf4.weight import NF4Weight
from lora_kernels.ops.packed.api import by_kind, gather, kept, of_weights, packed_fwd, seed_for
from lora_kernels.ops.packed.schema import META, check_inputs, pack_needs, split_base

# Gate and up are packed, streams 0 and 1; down follows.
DOWN = 2


def _forward(
    x: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scales: list[Scale],
    meta: list[int],
    activation: int,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """y, and what the backward reads: s, g, u, s of down."""
    a, b, bias, base = by_kind(tensors, len(scales))
    down, down_meta, where = split_base(base, meta)[DOWN]
    (g, u), s = packed_fwd(
        x,
        base[: where.start],
        meta[: DOWN * META],
        a[:DOWN],
        b[:DOWN],
        scales[:DOWN],
        bias[:DOWN],
        dropout_p,
        seed,
    )
    h = torch.ops.lora_kernels.glu_fwd(g, u, activation)
    y, s_down = scaled_op("lora_linear_fwd", scales)(
        h,
        down,
        down_meta,
        a[DOWN],
        b[DOWN],
        scales[DOWN],
        bias[DOWN],
        dropout_p,
        seed,
        None,
        None,
        DOWN,
    )
    return y, s, g, u, s_down


class LoRAMLPFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        dropout_p: float,
        scales: list[Scale],
        meta: list[int],
        activation: int,
        *tensors: Tensor,
    ) -> Tensor:
        y, s, g, u, s_down = _forward(x, seed, dropout_p, scales, meta, activation, *tensors)
        a, b, _, base = by_kind(tensors, len(scales))
        ctx.save_for_backward(x, s, g, u, s_down, seed, *a, *b, *base)
        ctx.dropout_p, ctx.scales, ctx.meta = dropout_p, scales, meta
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, g, u, s_down, seed, *parameters = ctx.saved_tensors
        p, meta = len(ctx.scales), ctx.meta
        a, b, base = parameters[:p], parameters[p : 2 * p], parameters[2 * p :]
        asked = ctx.needs_input_grad
        want = by_kind(asked[6:], p)
        want_w = of_weights(want[3], meta)
        want_a, want_b, want_bias, *_ = want
        into_gate = pack_needs(asked[0], *(w[:DOWN] for w in (*want[:3], want_w)))
        down, down_meta, where = split_base(base, meta)[DOWN]
        dy = to_rows(dy)

        def down_grads(h: Tensor, dx: bool, da: bool, rest: bool, dw: bool) -> tuple[Tensor, ...]:
            """(dh, da, db, dbias, ..., dw); only da and dw read h."""
            needs = [dx, da, rest and want_b[DOWN], rest and want_bias[DOWN], False, False, dw]
            return scaled_op("lora_linear_bwd", ctx.scales)(
                dy,
                h,
                s_down,
                down,
                down_meta,
                a[DOWN],
                b[DOWN],
                ctx.scales[DOWN],
                ctx.dropout_p,
                seed,
                None,
                None,
                needs,
                DOWN,
            )

        need_h = want_a[DOWN] or want_w[DOWN]
        if not any(into_gate):
            h = torch.ops.lora_kernels.glu_fwd(g, u, ctx.activation) if need_h else g
            _, da, db, dbias, _, _, dw = down_grads(h, False, want_a[DOWN], True, want_w[DOWN])
            return (*[None] * 6, *kept(_of_down(da, db, dbias, dw), want, meta))
        dh, da, db, dbias, _, _, dw = down_grads(g, True, False, True, False)
        dg, du, h = torch.ops.lora_kernels.glu_bwd(dh, g, u, ctx.activation, need_h)
        del dh
        if need_h:
            _, da, _, _, _, _, dw = down_grads(h, False, want_a[DOWN], False, want_w[DOWN])
        del h
        dx, *grads = scaled_op("lora_packed_bwd", ctx.scales)(
            [dg, du],
            x,
            s,
            base[: where.start],
            meta[: DOWN * META],
            a[:DOWN],
            b[:DOWN],
            ctx.scales[:DOWN],
            ctx.dropout_p,
            seed,
            into_gate,
        )
        all_grads = [[*of, last] for of, last in zip(grads, (da, db, dbias, dw), strict=True)]
        return (dx if asked[0] else None, *[None] * 5, *kept(all_grads, want, meta))


def _of_down(*grads: Tensor) -> list[list[Tensor]]:
    """The lists of all three projections where only down's gradients were asked for."""
    return [[grad] * (DOWN + 1) for grad in grads]


def lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The gated MLP y = down(act(gate(x)) * up(x)) of three LoRA projections.

    Every sequence holds the entries of gate, up and down, in this order. Differentiable in every
    tensor, and only what requires a gradient is computed. Between forward and backward x, gate's
    and up's outputs [M, I] and the three s [M, r_i] are kept, nothing else. Under autocast x, dense
    weights and biases are cast; the adapters stay as they are.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        weights: gate and up W [I, K], down W [N, I], each a tensor in x's dtype or an `NF4Weight`;
            kinds may be mixed.
        lora_a: gate and up A [r_i, K], down A [r_i, I], all of one floating dtype, x's or another;
            gradients come in it.
        lora_b: gate and up B [I, r_i], down B [N, r_i] in A's dtype.
        scales: alpha_i / r_i, or alpha_i / sqrt(r_i) for rsLoRA.
        biases: gate and up [I], down [N] in x's dtype or None, for each; None: no bias at all.
        activation: "silu" (SwiGLU), "gelu" (GeGLU, with the exact error function) or "gelu_tanh"
            (GeGLU with the usual approximation by tanh).
        dropout_p: probability that an element of a branch's input is dropped; gate, up and down
            drop by streams 0, 1 and 2 of the seed.
        seed: the masks' int64 seed [1] on x's device; None draws one from that device's default
            generator when dropout_p > 0.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: a number of entries, a shape, a device, dropout_p or the activation does not
            fit.
        TypeError: a dtype or the kind of an entry does not fit.

    Source: Shazeer, 2020, "GLU Variants Improve Transformer"; Hu et al., 2021, "LoRA".
    """
    try:
        index = activation_index(activation)
        if len(weights) != DOWN + 1:
            raise ValueError(f"weights: got {len(weights)} entries, expected 3: gate, up and down")
        x, p = gather(x, weights, lora_a, lora_b, scales, biases)
        check_inputs(x, dropout_p, seed)
        inner = p.meta[0]
        for i, k in enumerate((x.shape[-1], x.shape[-1], inner)):
            p.check(i, x, k)
        if p.meta[META] != inner:
            raise ValueError(
                f"weights[1]: got shape {p.meta[META : META + 2]}, expected "
                f"[{inner}, {x.shape[-1]}] as weights[0] has"
            )
        seed = seed_for(x, dropout_p, seed)
        arguments: tuple[Any, ...] = (
            to_rows(x),
            seed,
            dropout_p,
            p.scales,
            p.meta,
            index,
            *p.tensors(),
        )
        y = LoRAMLPFunction.apply(*arguments) if p.need_grad(x) else _forward(*arguments)[0]
        return from_rows(y, x)
    except Exception:
        check_kinds(lora_mlp, locals())
        raise
