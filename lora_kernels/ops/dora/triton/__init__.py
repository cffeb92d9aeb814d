"""What the Triton DoRA kernels take; importing this does not import triton."""

from __future__ import annotations

from lora_kernels.ops.common.launch import refuse_triton, register_triton
from lora_kernels.ops.dora.schema import DoRALinearBackward, DoRALinearForward, DoRANorm


def _norm(c: DoRANorm) -> str | None:
    return refuse_triton([c.a, c.b, c.base[0] if len(c.base) == 1 else None])


def _fwd(c: DoRALinearForward) -> str | None:
    return refuse_triton([c.x, c.a, c.b, c.magnitude, c.norm, c.bias])


def _bwd(c: DoRALinearBackward) -> str | None:
    return refuse_triton([c.x, c.dy, c.s, c.a, c.b, c.magnitude, c.norm, c.u])


register_triton("dora_norm", "lora_kernels.ops.dora.triton.norm", _norm)
register_triton("dora_linear_fwd", "lora_kernels.ops.dora.triton.forward", _fwd)
register_triton("dora_linear_bwd", "lora_kernels.ops.dora.triton.backward", _bwd)
