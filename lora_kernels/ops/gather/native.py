"""What the compiled multi-adapter kernels take (csrc/bindings/gather.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import EMPTY, refuse_linear, register_native

_FLOATS = (torch.float32,)


def _refuse(
    op: str,
    activations: Sequence[Tensor],
    base: Sequence[Tensor],
    bias: Tensor | None,
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
) -> str | None:
    dense = base[0] if len(base) == 1 else None
    reason = refuse_linear(op, activations, dense, bias)
    if reason is None:
        a, b, scales = pages[0::5], pages[1::5], pages[4::5]
        if any(t.shape[-1] == 0 for t in (*a, *b)):
            return EMPTY
        reason = refuse_linear(op, activations, *(t for t in a if t.numel()))
        if any(t.dtype not in _FLOATS for t in (*scales, *entries[2:])):
            reason = "takes scales and weights in float32"
    return reason


def _fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    bias: Tensor | None,
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
    dropout: Sequence[Tensor],
) -> str | None:
    return _refuse("gather_lora_fwd", [x], base, bias, pages, entries)


def _add(
    out: Tensor, x: Tensor, pages: Sequence[Tensor], entries: Sequence[Tensor], overwrite: bool
) -> str | None:
    return _refuse("gather_lora_add", [out, x], [], None, pages, entries)


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
    return _refuse("gather_lora_bwd", [dy, x, s], base, None, pages, entries)


register_native("gather_lora_fwd", _fwd)
register_native("gather_lora_add", _add)
register_native("gather_lora_bwd", _bwd)
