"""y = down(act(gate(x)) * up(x)), each of the three a LoRA projection.

With g = gate(x), u = up(x) [M, I] and h = act(g) * u; `ops/lora/api.py` and `ops/packed/api.py`
derive the projections, `ops/glu/api.py` the gate.

Backward, with dy = ∂L/∂y:
    dh               from dy through down
    dg, du, h        from dh, g and u, in one elementwise pass
    dA_down          from dy and h; ds_down = scale·dy·B_down [M, r] is small and computed again
    dx and the rest  from dg and du through gate and up
Saved: x, s of gate and up, g, u, s of down and the seed (and the parameters themselves); h is made
again from g and u.

Source: Shazeer, 2020, "GLU Variants Improve Transformer"; Hu et al., 2021, "LoRA".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.fields import Fields
from lora_kernels.ops.common.flatten import from_rows, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.common.scale import run_scaled
from lora_kernels.ops.glu.schema import activation_index
from lora_kernels.ops.lora.schema import LoRALinearForward
from lora_kernels.ops.nf4.weight import NF4Weight
from lora_kernels.ops.packed.api import by_field, gather, of_weights, packed_fwd, ready, wants_grad
from lora_kernels.ops.packed.schema import META, LoRAPackedForward, pack_needs, split_base

# Gate and up are packed, streams 0 and 1; down follows.
DOWN = 2


class LoRAMLP(NamedTuple):
    """An MLP's arguments: its three projections, as if all of them read x, and its activation."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scales: Sequence[float]
    bias: Sequence[Tensor | None]
    dropout_p: float
    seed: Tensor | None
    activation: int

    def projections(self) -> LoRAPackedForward:
        """Not a property: torch.compile in 2.10 cannot read properties of a named tuple."""
        return LoRAPackedForward(*self[:-1])


def _down(p: LoRAPackedForward, h: Tensor) -> LoRALinearForward:
    base, meta, _ = split_base(p.base, p.meta)[DOWN]
    return p.one(DOWN, base, meta)._replace(x=h)


def _forward(c: LoRAMLP) -> tuple[Tensor, ...]:
    """y, and what the backward reads: s, g, u, s of down."""
    p = c.projections()
    (g, u), s = packed_fwd(p.first(DOWN))
    h = torch.ops.lora_kernels.glu_fwd(g, u, c.activation)
    y, s_down = run_scaled("lora_linear_fwd", _down(p, h))
    return y, s, g, u, s_down


_FIELDS = Fields(LoRAMLP)


class LoRAMLPFunction(KeepsSettings):
    @staticmethod
    def forward(ctx: Any, counts: tuple[int, ...], *values: Any) -> Tensor:
        c = _FIELDS.gathered(counts, values)
        y, *made = _forward(c)
        _FIELDS.keep(ctx, counts, values, *made, without=c.bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        c, (s, g, u, s_down) = _FIELDS.kept(ctx)
        asked = _FIELDS.asked(ctx)
        want_w = of_weights(asked.base, c.meta)
        want = (asked.a, asked.b, asked.bias, want_w)
        want_a, want_b, want_bias = asked.a[DOWN], asked.b[DOWN], asked.bias[DOWN]
        into_gate = pack_needs(asked.x, *(w[:DOWN] for w in want))
        p, dy = c.projections(), to_rows(dy)

        def down_grads(h: Tensor, dx: bool, da: bool, rest: bool, dw: bool) -> tuple[Tensor, ...]:
            """(dh, da, db, dbias, ..., dw); only da and dw read h."""
            needs = [dx, da, rest and want_b, rest and want_bias, False, False, dw]
            call = _down(p, h).backward(dy, s_down, needs)
            return run_scaled("lora_linear_bwd", call)

        need_h = want_a or want_w[DOWN]
        if not any(into_gate):
            h = torch.ops.lora_kernels.glu_fwd(g, u, c.activation) if need_h else g
            _, da, db, dbias, _, _, dw = down_grads(h, False, want_a, True, want_w[DOWN])
            return _FIELDS.grads(**by_field(_of_down(da, db, dbias, dw), want, c.base, c.meta))
        dh, da, db, dbias, _, _, dw = down_grads(g, True, False, True, False)
        dg, du, h = torch.ops.lora_kernels.glu_bwd(dh, g, u, c.activation, need_h)
        del dh
        if need_h:
            _, da, _, _, _, _, dw = down_grads(h, False, want_a, False, want_w[DOWN])
        del h
        call = p.first(DOWN).backward([dg, du], s, into_gate)
        dx, *grads = run_scaled("lora_packed_bwd", call)
        all_grads = [[*of, last] for of, last in zip(grads, (da, db, dbias, dw), strict=True)]
        dx = dx if asked.x else None
        return _FIELDS.grads(x=dx, **by_field(all_grads, want, c.base, c.meta))


def _of_down(*grads: Tensor) -> list[list[Tensor]]:
    """Lists for all three projections, though only down's gradients were computed."""
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

    Examples:
        >>> x, r = torch.randn(3, 64), 8
        >>> weights = [torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96)]
        >>> a = [torch.randn(r, w.shape[1]) for w in weights]
        >>> b = [torch.randn(w.shape[0], r) for w in weights]
        >>> lk.functional.lora_mlp(x, weights, a, b, scales=[2.0] * 3).shape
        torch.Size([3, 64])
    """
    try:
        index = activation_index(activation)
        if len(weights) != DOWN + 1:
            raise ValueError(f"weights: got {len(weights)} entries, expected 3: gate, up and down")
        p = gather(x, weights, lora_a, lora_b, scales, biases, dropout_p, seed)
        k = p.x.shape[-1] if p.x.dim() else 0
        inner = p.meta[0]
        p.check((k, k, inner))
        if p.meta[META] != inner:
            raise ValueError(
                f"weights[1]: got shape {p.meta[META : META + 2]}, expected [{inner}, {k}] as "
                "weights[0] has"
            )
        rows = ready(p)
        c = LoRAMLP(*rows, index)
        y = (
            LoRAMLPFunction.apply(_FIELDS.counts(c), *_FIELDS.spread(c))
            if wants_grad(rows)
            else _forward(c)[0]
        )
        return from_rows(y, p.x)
    except Exception:
        check_kinds(lora_mlp, locals())
        raise
