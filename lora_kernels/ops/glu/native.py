"""What the compiled gated linear units take (csrc/bindings/glu.cpp)."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.native import refuse_device, refuse_dtypes, register_native


def _fwd(g: Tensor, u: Tensor, activation: int) -> str | None:
    return refuse_device("glu_fwd", g.device) or refuse_dtypes(g, u)


def _bwd(dh: Tensor, g: Tensor, u: Tensor, activation: int, need_h: bool) -> str | None:
    return refuse_device("glu_bwd", g.device) or refuse_dtypes(dh, g, u)


register_native("glu_fwd", _fwd)
register_native("glu_bwd", _bwd)
