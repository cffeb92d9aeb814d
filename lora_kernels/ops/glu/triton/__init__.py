"""What the Triton kernels of gated linear units take; importing this does not import triton."""

from __future__ import annotations

from lora_kernels.ops.common.launch import refuse_triton, register_triton
from lora_kernels.ops.glu.schema import GLUBackward, GLUForward


def _fwd(c: GLUForward) -> str | None:
    return refuse_triton([c.g, c.u])


def _bwd(c: GLUBackward) -> str | None:
    return refuse_triton([c.g, c.dh, c.u])


register_triton("glu_fwd", "lora_kernels.ops.glu.triton.activation", _fwd)
register_triton("glu_bwd", "lora_kernels.ops.glu.triton.activation", _bwd)
