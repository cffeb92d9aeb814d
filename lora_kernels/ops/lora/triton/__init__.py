"""What the Triton LoRA kernels take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.ops.common.launch import refuse_device, refuse_triton, register_triton


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
    return refuse_triton([x, a, b, bias, rank_diag, out_diag])


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
    return refuse_triton([x, dy, s, a, b, rank_diag, out_diag])


def _mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> str | None:
    return refuse_device(seed.device)


register_triton("lora_linear_fwd", "lora_kernels.ops.lora.triton.forward", _fwd)
register_triton("lora_linear_bwd", "lora_kernels.ops.lora.triton.backward", _bwd)
register_triton("dropout_mask", "lora_kernels.ops.lora.triton.forward", _mask)
