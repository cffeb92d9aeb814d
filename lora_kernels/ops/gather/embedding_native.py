"""What the compiled kernels of many adapters on an embedding take: W, out and dy, and the pages,
of any of the three dtypes each (csrc/bindings/gather_embedding.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import refuse_linear, register_native
from lora_kernels.ops.gather.embedding_schema import (
    GatherEmbedAdd,
    GatherEmbedBackward,
    GatherEmbedForward,
)


def _refuse(op: str, activations: Tensor, pages: Sequence[Tensor]) -> str | None:
    a, scales = pages[0], pages[4]
    reason = refuse_linear(op, [activations, a])
    if reason is None and scales.dtype != torch.float32:
        reason = "takes scales in float32"
    return reason


def _fwd(c: GatherEmbedForward) -> str | None:
    like = c.pages[0] if c.weight is None else c.weight
    return _refuse("gather_lora_embed_fwd", like, c.pages)


def _add(c: GatherEmbedAdd) -> str | None:
    reason = _refuse("gather_lora_embed_add", c.out, c.pages)
    if reason is None and c.out.numel() and c.out.stride(-1) != 1:
        reason = "takes an out whose last dimension is contiguous"
    return reason


def _bwd(c: GatherEmbedBackward) -> str | None:
    return _refuse("gather_lora_embed_bwd", c.dy, c.pages)


register_native("gather_lora_embed_fwd", _fwd)
register_native("gather_lora_embed_add", _add)
register_native("gather_lora_embed_bwd", _bwd)
