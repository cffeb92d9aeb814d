"""What the compiled LoRA kernels take (csrc/bindings: lora, dropout, nf4_linear_cuda)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.checks import names
from lora_kernels.ops.common.native import (
    refuse_cuda_linear,
    refuse_device,
    refuse_linear,
    register_native,
)
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.lora.schema import DropoutMask, LoRALinearBackward, LoRALinearForward


def _dense(base: Sequence[Tensor]) -> Tensor | None:
    return base[0] if len(base) == 1 else None


def _fwd(c: LoRALinearForward) -> str | None:
    x, a, rank, out = c.x, c.a, c.rank_diag, c.out_diag
    reason = refuse_linear("lora_linear_fwd", [x], _dense(c.base), a, c.b, c.bias, rank, out)
    if reason is not None or x.device.type != "cuda":
        return reason
    if c.seed is not None and threshold(c.dropout_p) > 0:
        return "takes no dropout on CUDA"
    if rank is not None or out is not None:
        return "takes no diagonals on CUDA"
    adapters = list(dict.fromkeys((x.dtype, torch.float32)))
    if a.dtype not in adapters:
        return f"takes adapters in {names(adapters)} on CUDA, not {names([a.dtype])}"
    return refuse_cuda_linear(x, c.meta)


def _bwd(c: LoRALinearBackward) -> str | None:
    parameters = (_dense(c.base), c.a, c.b, c.rank_diag, c.out_diag)
    return refuse_linear("lora_linear_bwd", [c.dy, c.x, c.s], *parameters)


def _mask(c: DropoutMask) -> str | None:
    return refuse_device("dropout_mask", c.seed.device)


register_native("lora_linear_fwd", _fwd)
register_native("lora_linear_bwd", _bwd)
register_native("dropout_mask", _mask)
