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


register_triton("gather_lora_fwd", "lora_kernels.ops.gather.triton.forward", _fwd)
register_triton("gather_lora_add", "lora_kernels.ops.gather.triton.forward", _add)
register_triton("gather_lora_bwd", "lora_kernels.ops.gather.triton.backward", _bwd)
