"""Packed LoRA projections in plain PyTorch: one after the other, the oracle of other backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import Implementation, register
from lora_kernels.ops.lora.reference import lora_linear_bwd, lora_linear_fwd
from lora_kernels.ops.packed.schema import rank_slices, split_base, unpack_needs


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
    """y_i = x·W_iᵀ + scale_i·s_i·B_iᵀ + bias_i with s_i = drop_i(x)·A_iᵀ, drop_i by stream i."""
    results = [
        lora_linear_fwd(
            x, w, m, a[i], b[i], scales[i], bias[i], dropout_p, seed, None, None, stream=i
        )
        for i, (w, m, _) in enumerate(split_base(base, meta))
    ]
    return [y for y, _ in results], torch.cat([s for _, s in results], dim=1)


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
    """The derivation stands in `api.py`."""
    want_x, wants = unpack_needs(needs, len(a))
    columns, grads = list(rank_slices(a)), []
    for i, (w, m, _) in enumerate(split_base(base, meta)):
        want_a, want_b, want_bias, want_w = wants[i]
        asked = [want_x, want_a, want_b, want_bias, False, False, want_w]
        of_adapter = (a[i], b[i], scales[i], dropout_p, seed, None, None)
        grads.append(lora_linear_bwd(dy[i], x, s[:, columns[i]], w, m, *of_adapter, asked, i))
    dx, da, db, dbias, _, _, dw = zip(*grads, strict=True)
    return sum(dx[1:], start=dx[0]), list(da), list(db), list(dbias), list(dw)


def _accepts(*args: object, **kwargs: object) -> str | None:
    return None


for _op in (lora_packed_fwd, lora_packed_bwd):
    register(_op.__name__, Implementation("reference", _op, _accepts))
