"""What the Triton kernels of packed projections take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.ops.common.launch import refuse_triton, register_triton


def _fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> str | None:
    return refuse_triton([x, *a, *b, *bias])


def _bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> str | None:
    return refuse_triton([x, s, *dy, *a, *b])


register_triton("lora_packed_fwd", "lora_kernels.ops.packed.triton.forward", _fwd)
register_triton("lora_packed_bwd", "lora_kernels.ops.packed.triton.backward", _bwd)
