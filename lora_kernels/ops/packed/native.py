"""Packed projections made of the compiled kernels for one projection (csrc/bindings/lora.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.op import NATIVE_NAMESPACE, Implementation
from lora_kernels.dispatch.registry import register
from lora_kernels.ops.common.native import refuse_linear
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.packed.schema import (
    LoRAPackedBackward,
    LoRAPackedForward,
    rank_slices,
    split_base,
)


def _refuse(
    op: str,
    activations: Sequence[Tensor],
    c: LoRAPackedForward | LoRAPackedBackward,
    *parameters: Sequence[Tensor | None],
) -> str | None:
    for i, (w, _, _) in enumerate(split_base(c.base, c.meta)):
        dense = w[0] if len(w) == 1 else None
        reason = refuse_linear(op, activations, dense, *(p[i] for p in parameters))
        if reason is not None:
            return f"projection {i}: {reason}"
    return None


def _refuse_fwd(c: LoRAPackedForward) -> str | None:
    return _refuse("lora_linear_fwd", [c.x], c, c.a, c.b, c.bias)


def _refuse_bwd(c: LoRAPackedBackward) -> str | None:
    return _refuse("lora_linear_bwd", [c.x, c.s, *c.dy], c, c.a, c.b)


def lora_packed_fwd(c: LoRAPackedForward) -> tuple[list[Tensor], Tensor]:
    forward = getattr(torch.ops, NATIVE_NAMESPACE).lora_linear_fwd.default
    columns = list(rank_slices(c.a))
    y, s = [], c.x.new_empty((c.x.shape[0], columns[-1].stop), dtype=rank_dtype(c.x.dtype))
    for i, (w, m, _) in enumerate(split_base(c.base, c.meta)):
        y_i, s[:, columns[i]] = forward(*c.one(i, w, m))
        y.append(y_i)
    return y, s


def lora_packed_bwd(
    c: LoRAPackedBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Each projection's part of dx is rounded to x's dtype, as is their sum: the plain expression
    rounds as often."""
    backward = getattr(torch.ops, NATIVE_NAMESPACE).lora_linear_bwd.default
    columns = list(rank_slices(c.a))
    dx: Tensor | None = None
    grads: list[list[Tensor]] = [[], [], [], []]
    for i, (w, m, _) in enumerate(split_base(c.base, c.meta)):
        part, da, db, dbias, _, _, dw = backward(*c.one(i, w, m, c.s[:, columns[i]]))
        dx = part if dx is None else dx.add_(part)
        for into, grad in zip(grads, (da, db, dbias, dw), strict=True):
            into.append(grad)
    assert dx is not None
    return dx, grads[0], grads[1], grads[2], grads[3]


register("lora_packed_fwd", Implementation("native", lora_packed_fwd, _refuse_fwd))
register("lora_packed_bwd", Implementation("native", lora_packed_bwd, _refuse_bwd))
