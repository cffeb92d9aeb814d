"""What the compiled multi-adapter kernels take (csrc/bindings/gather.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.native import (
    DTYPES,
    EMPTY,
    refuse_dtypes,
    refuse_linear,
    register_native,
)
from lora_kernels.ops.gather.pages import FIELDS
from lora_kernels.ops.gather.schema import (
    GatherLoRAAdd,
    GatherLoRABackward,
    GatherLoRAForward,
)

_FACTORS = "takes scales and weights in float32"


def _refuse(
    op: str,
    activations: Sequence[Tensor],
    base: Sequence[Tensor],
    bias: Tensor | None,
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
) -> str | None:
    reason = refuse_linear(op, activations, base[0] if len(base) == 1 else None, bias)
    if reason is not None:
        return reason
    for i in range(0, len(pages), FIELDS):
        a, b, _, _, scales = pages[i : i + FIELDS]
        if a.dtype not in DTYPES:
            return refuse_dtypes(a)
        if a.shape[-1] == 0 or b.shape[-1] == 0:
            return EMPTY
        if scales.dtype is not torch.float32:
            return _FACTORS
    return _FACTORS if len(entries) > 2 and entries[2].dtype is not torch.float32 else None


def _fwd(c: GatherLoRAForward) -> str | None:
    return _refuse("gather_lora_fwd", [c.x], c.base, c.bias, c.pages, c.entries)


def _add(c: GatherLoRAAdd) -> str | None:
    return _refuse("gather_lora_add", [c.out, c.x], [], None, c.pages, c.entries)


def _bwd(c: GatherLoRABackward) -> str | None:
    return _refuse("gather_lora_bwd", [c.dy, c.x, c.s], c.base, None, c.pages, c.entries)


register_native("gather_lora_fwd", _fwd)
register_native("gather_lora_add", _add)
register_native("gather_lora_bwd", _bwd)
