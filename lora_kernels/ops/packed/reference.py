"""Packed LoRA projections in plain PyTorch: one after the other, the oracle of other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.lora.reference import lora_linear_bwd, lora_linear_fwd
from lora_kernels.ops.packed.schema import (
    LoRAPackedBackward,
    LoRAPackedForward,
    rank_slices,
    split_base,
)


@register_reference
def lora_packed_fwd(c: LoRAPackedForward) -> tuple[list[Tensor], Tensor]:
    """y_i = x·W_iᵀ + scale_i·s_i·B_iᵀ + bias_i with s_i = drop_i(x)·A_iᵀ, drop_i by stream i."""
    parts = enumerate(split_base(c.base, c.meta))
    results = [lora_linear_fwd(c.one(i, w, m)) for i, (w, m, _) in parts]
    return [y for y, _ in results], torch.cat([s for _, s in results], dim=1)


@register_reference
def lora_packed_bwd(
    c: LoRAPackedBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The derivation stands in `api.py`."""
    columns, parts = list(rank_slices(c.a)), enumerate(split_base(c.base, c.meta))
    grads = [lora_linear_bwd(c.one(i, w, m, c.s[:, columns[i]])) for i, (w, m, _) in parts]
    dx, da, db, dbias, _, _, dw = zip(*grads, strict=True)
    return sum(dx[1:], start=dx[0]), list(da), list(db), list(dbias), list(dw)
