"""What the Triton multi-adapter kernels take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import refuse_triton, register_triton


def _refuse(
    activations: Sequence[Tensor | None], pages: Sequence[Tensor], entries: Sequence[Tensor]
) -> str | None:
    if any(t.dtype != torch.float32 for t in (*pages[4::5], *entries[2:])):
        return "takes scales and weights in float32"
    return refuse_triton([*activations, *pages[0::5]])


def _fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    bias: Tensor | None,
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
    dropout: Sequence[Tensor],
) -> str | None:
    return _refuse([x, bias], pages, entries)


def _add(
    out: Tensor, x: Tensor, pages: Sequence[Tensor], entries: Sequence[Tensor], overwrite: bool
) -> str | None:
    return _refuse([x, out], pages, entries)


def _bwd(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
    dropout: Sequence[Tensor],
    needs: Sequence[bool],
) -> str | None:
    return _refuse([x, dy, s], pages, entries)


def _embed(activations: Tensor, pages: Sequence[Tensor]) -> str | None:
    return _refuse([activations], pages, ())


def _embed_fwd(
    ids: Tensor, weight: Tensor | None, pages: Sequence[Tensor], slots: Tensor
) -> str | None:
    return _embed(pages[0] if weight is None else weight, pages)


def _embed_add(out: Tensor, ids: Tensor, pages: Sequence[Tensor], slots: Tensor) -> str | None:
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        return "takes an out whose last dimension is contiguous"
    return _embed(out, pages)


def _embed_bwd(
    dy: Tensor, ids: Tensor, pages: Sequence[Tensor], slots: Tensor, needs: Sequence[bool]
) -> str | None:
    return _embed(dy, pages)


_EMBEDDING = "lora_kernels.ops.gather.triton.embedding"
register_triton("gather_lora_embed_fwd", _EMBEDDING, _embed_fwd)
register_triton("gather_lora_embed_add", _EMBEDDING, _embed_add)
register_triton("gather_lora_embed_bwd", _EMBEDDING, _embed_bwd)
register_triton("gather_lora_fwd", "lora_kernels.ops.gather.triton.forward", _fwd)
register_triton("gather_lora_add", "lora_kernels.ops.gather.triton.forward", _add)
register_triton("gather_lora_bwd", "lora_kernels.ops.gather.triton.backward", _bwd)
