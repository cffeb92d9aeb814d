"""What the compiled multi-adapter kernels take (csrc/bindings/gather.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import EMPTY, refuse_linear, register_native
from lora_kernels.ops.gather.schema import (
    GatherLoRAAdd,
    GatherLoRABackward,
    GatherLoRAForward,
)

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


def _fwd(c: GatherLoRAForward) -> str | None:
    return _refuse("gather_lora_fwd", [c.x], c.base, c.bias, c.pages, c.entries)


def _add(c: GatherLoRAAdd) -> str | None:
    return _refuse("gather_lora_add", [c.out, c.x], [], None, c.pages, c.entries)


def _bwd(c: GatherLoRABackward) -> str | None:
    return _refuse("gather_lora_bwd", [c.dy, c.x, c.s], c.base, None, c.pages, c.entries)


register_native("gather_lora_fwd", _fwd)
register_native("gather_lora_add", _add)
register_native("gather_lora_bwd", _bwd)
