"""What the Triton kernels of packed projections take; importing this does not import triton."""

from __future__ import annotations

from lora_kernels.ops.common.launch import refuse_triton, register_triton
from lora_kernels.ops.packed.schema import LoRAPackedBackward, LoRAPackedForward


def _fwd(c: LoRAPackedForward) -> str | None:
    return refuse_triton([c.x, *c.a, *c.b, *c.bias])


def _bwd(c: LoRAPackedBackward) -> str | None:
    return refuse_triton([c.x, c.s, *c.dy, *c.a, *c.b])


register_triton("lora_packed_fwd", "lora_kernels.ops.packed.triton.forward", _fwd)
register_triton("lora_packed_bwd", "lora_kernels.ops.packed.triton.backward", _bwd)
