"""What the Triton kernels of gated linear units take; importing this does not import triton."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.launch import refuse_triton, register_triton


def _fwd(g: Tensor, u: Tensor, activation: int) -> str | None:
    return refuse_triton([g, u])


def _bwd(dh: Tensor, g: Tensor, u: Tensor, activation: int, need_h: bool) -> str | None:
    return refuse_triton([g, dh, u])


register_triton("glu_fwd", "lora_kernels.ops.glu.triton.launchers", _fwd)
register_triton("glu_bwd", "lora_kernels.ops.glu.triton.launchers", _bwd)
