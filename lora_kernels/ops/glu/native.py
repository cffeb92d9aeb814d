"""What the compiled gated linear units take (csrc/bindings/glu.cpp)."""

from __future__ import annotations

from lora_kernels.ops.common.native import refuse_device, refuse_dtypes, register_native
from lora_kernels.ops.glu.schema import GLUBackward, GLUForward


def _fwd(c: GLUForward) -> str | None:
    return refuse_device("glu_fwd", c.g.device) or refuse_dtypes(c.g, c.u)


def _bwd(c: GLUBackward) -> str | None:
    return refuse_device("glu_bwd", c.g.device) or refuse_dtypes(c.dh, c.g, c.u)


register_native("glu_fwd", _fwd)
register_native("glu_bwd", _bwd)
