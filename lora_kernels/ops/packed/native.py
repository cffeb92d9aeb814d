"""Packed projections out of the compiled kernels of one projection (csrc/bindings/linear.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import NATIVE_NAMESPACE, Implementation, register
from lora_kernels.ops.common.native import refuse_linear
from lora_kernels.ops.packed.schema import rank_slices, split_base, unpack_needs


def _refuse(
    op: str,
    activations: Sequence[Tensor],
    base: Sequence[Tensor],
    meta: Sequence[int],
    *parameters: Sequence[Tensor | None],
) -> str | None:
    for i, (w, _, _) in enumerate(split_base(base, meta)):
        dense = w[0] if len(w) == 1 else None
        reason = refuse_linear(op, activations, dense, *(p[i] for p in parameters))
        if reason is not None:
            return f"projection {i}: {reason}"
    return None


def _refuse_fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return _refuse("lora_linear_fwd", [x], base, meta, a, b, bias)


def _refuse_bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> str | None:
    return _refuse("lora_linear_bwd", [x, s, *dy], base, meta, a, b)


def lora_packed_fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    forward = getattr(torch.ops, NATIVE_NAMESPACE).lora_linear_fwd.default
    columns = list(rank_slices(a))
    y, s = [], x.new_empty((x.shape[0], columns[-1].stop))
    for i, (w, m, _) in enumerate(split_base(base, meta)):
        y_i, s[:, columns[i]] = forward(
            x, w, m, a[i], b[i], scales[i], bias[i], dropout_p, seed, None, None, i
        )
        y.append(y_i)
    return y, s


def lora_packed_bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Each projection's part of dx is rounded to x's dtype, as is their sum: the plain expression
    rounds as often."""
    backward = getattr(torch.ops, NATIVE_NAMESPACE).lora_linear_bwd.default
    want_x, wants = unpack_needs(needs, len(a))
    columns = list(rank_slices(a))
    dx: Tensor | None = None
    grads: list[list[Tensor]] = [[], [], [], []]
    for i, (w, m, _) in enumerate(split_base(base, meta)):
        want_a, want_b, want_bias, want_w = wants[i]
        asked = [want_x, want_a, want_b, want_bias, False, False, want_w]
        of_adapter = (a[i], b[i], scales[i], dropout_p, seed, None, None)
        part, da, db, dbias, _, _, dw = backward(
            dy[i], x, s[:, columns[i]], w, m, *of_adapter, asked, i
        )
        dx = part if dx is None else dx.add_(part)
        for into, grad in zip(grads, (da, db, dbias, dw), strict=True):
            into.append(grad)
    assert dx is not None
    return dx, grads[0], grads[1], grads[2], grads[3]


register("lora_packed_fwd", Implementation("native", lora_packed_fwd, _refuse_fwd))
register("lora_packed_bwd", Implementation("native", lora_packed_bwd, _refuse_bwd))
