"""What the compiled LoRA kernels take (csrc/bindings/lora.cpp, dropout.cpp)."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.native import refuse_device, register_native


def _mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> str | None:
    return refuse_device("dropout_mask", seed.device)


register_native("dropout_mask", _mask)
