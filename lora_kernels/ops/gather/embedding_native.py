"""What the compiled kernels of many adapters on an embedding take: W, out and dy, and the pages,
of any of the three dtypes each (csrc/bindings/gather_embedding.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import refuse_linear, register_native


def _refuse(op: str, activations: Tensor, pages: Sequence[Tensor]) -> str | None:
    a, scales = pages[0], pages[4]
    reason = refuse_linear(op, [activations, a])
    if reason is None and scales.dtype != torch.float32:
        reason = "takes scales in float32"
    return reason


def _fwd(ids: Tensor, weight: Tensor | None, pages: Sequence[Tensor], slots: Tensor) -> str | None:
    return _refuse("gather_lora_embed_fwd", pages[0] if weight is None else weight, pages)


def _add(out: Tensor, ids: Tensor, pages: Sequence[Tensor], slots: Tensor) -> str | None:
    reason = _refuse("gather_lora_embed_add", out, pages)
    if reason is None and out.numel() and out.stride(-1) != 1:
        reason = "takes an out whose last dimension is contiguous"
    return reason


def _bwd(
    dy: Tensor, ids: Tensor, pages: Sequence[Tensor], slots: Tensor, needs: Sequence[bool]
) -> str | None:
    return _refuse("gather_lora_embed_bwd", dy, pages)


register_native("gather_lora_embed_fwd", _fwd)
register_native("gather_lora_embed_add", _add)
register_native("gather_lora_embed_bwd", _bwd)
