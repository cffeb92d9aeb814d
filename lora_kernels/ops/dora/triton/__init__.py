"""What the Triton DoRA kernels take; importing this does not import triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kernels.ops.common.launch import refuse_triton, register_triton


def _norm(
    weight_norm_sq: Tensor | None,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
) -> str | None:
    dense = base[0] if len(base) == 1 else None
    return refuse_triton([a, b, dense])


def _fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    keep_z: bool,
) -> str | None:
    return refuse_triton([x, a, b, magnitude, norm, bias])


def _bwd(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    z: Tensor | None,
    needs: Sequence[bool],
) -> str | None:
    return refuse_triton([x, dy, s, a, b, magnitude, norm, z])


register_triton("dora_norm", "lora_kernels.ops.dora.triton.norm", _norm)
register_triton("dora_linear_fwd", "lora_kernels.ops.dora.triton.forward", _fwd)
register_triton("dora_linear_bwd", "lora_kernels.ops.dora.triton.backward", _bwd)
