"""What the compiled LoRA kernels take (csrc/bindings: linear, dropout, nf4_linear_cuda)."""

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


def _dense(base: Sequence[Tensor]) -> Tensor | None:
    return base[0] if len(base) == 1 else None


def _fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    stream: int = 0,
) -> str | None:
    reason = refuse_linear("lora_linear_fwd", [x], _dense(base), a, b, bias, rank_diag, out_diag)
    if reason is not None or x.device.type != "cuda":
        return reason
    if seed is not None and threshold(dropout_p) > 0:
        return "takes no dropout on CUDA"
    if rank_diag is not None or out_diag is not None:
        return "takes no diagonals on CUDA"
    adapters = list(dict.fromkeys((x.dtype, torch.float32)))
    if a.dtype not in adapters:
        return f"takes adapters in {names(adapters)} on CUDA, not {names([a.dtype])}"
    return refuse_cuda_linear(x, meta)


def _bwd(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    rank_diag: Tensor | None,
    out_diag: Tensor | None,
    needs: Sequence[bool],
    stream: int = 0,
) -> str | None:
    return refuse_linear("lora_linear_bwd", [dy, x, s], _dense(base), a, b, rank_diag, out_diag)


def _mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> str | None:
    return refuse_device("dropout_mask", seed.device)


register_native("lora_linear_fwd", _fwd)
register_native("lora_linear_bwd", _bwd)
register_native("dropout_mask", _mask)
