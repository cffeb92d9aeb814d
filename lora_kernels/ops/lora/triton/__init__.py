"""What the Triton LoRA kernels take; importing this does not import triton."""

from __future__ import annotations

from lora_kernels.ops.common.launch import refuse_device, refuse_triton, register_triton
from lora_kernels.ops.lora.schema import DropoutMask, LoRALinearBackward, LoRALinearForward


def _fwd(c: LoRALinearForward) -> str | None:
    return refuse_triton([c.x, c.a, c.b, c.bias, c.rank_diag, c.out_diag])


def _bwd(c: LoRALinearBackward) -> str | None:
    return refuse_triton([c.x, c.dy, c.s, c.a, c.b, c.rank_diag, c.out_diag])


def _mask(c: DropoutMask) -> str | None:
    return refuse_device(c.seed.device)


register_triton("lora_linear_fwd", "lora_kernels.ops.lora.triton.forward", _fwd)
register_triton("lora_linear_bwd", "lora_kernels.ops.lora.triton.backward", _bwd)
register_triton("dropout_mask", "lora_kernels.ops.lora.triton.dropout", _mask)
