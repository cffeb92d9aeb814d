"""What the Triton multi-adapter kernels take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import refuse_triton, register_triton
from lora_kernels.ops.gather.embedding_schema import (
    GatherEmbedAdd,
    GatherEmbedBackward,
    GatherEmbedForward,
)
from lora_kernels.ops.gather.schema import (
    GatherLoRAAdd,
    GatherLoRABackward,
    GatherLoRAForward,
)


def _refuse(
    activations: Sequence[Tensor | None], pages: Sequence[Tensor], entries: Sequence[Tensor]
) -> str | None:
    if any(t.dtype != torch.float32 for t in (*pages[4::5], *entries[2:])):
        return "takes scales and weights in float32"
    return refuse_triton([*activations, *pages[0::5]])


def _fwd(c: GatherLoRAForward) -> str | None:
    return _refuse([c.x, c.bias], c.pages, c.entries)


def _add(c: GatherLoRAAdd) -> str | None:
    return _refuse([c.x, c.out], c.pages, c.entries)


def _bwd(c: GatherLoRABackward) -> str | None:
    return _refuse([c.x, c.dy, c.s], c.pages, c.entries)


def _embed_fwd(c: GatherEmbedForward) -> str | None:
    return _refuse([c.pages[0] if c.weight is None else c.weight], c.pages, ())


def _embed_add(c: GatherEmbedAdd) -> str | None:
    if c.out.stride(-1) != 1 and c.out.shape[-1] > 1:
        return "takes an out whose last dimension is contiguous"
    return _refuse([c.out], c.pages, ())


def _embed_bwd(c: GatherEmbedBackward) -> str | None:
    return _refuse([c.dy], c.pages, ())


_EMBEDDING = "lora_kernels.ops.gather.triton.embedding"
register_triton("gather_lora_embed_fwd", _EMBEDDING, _embed_fwd)
register_triton("gather_lora_embed_add", _EMBEDDING, _embed_add)
register_triton("gather_lora_embed_bwd", _EMBEDDING, _embed_bwd)
register_triton("gather_lora_fwd", "lora_kernels.ops.gather.triton.forward", _fwd)
register_triton("gather_lora_add", "lora_kernels.ops.gather.triton.forward", _add)
register_triton("gather_lora_bwd", "lora_kernels.ops.gather.triton.backward", _bwd)
