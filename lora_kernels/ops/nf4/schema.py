"""Schemas, checks and fakes of the NF4 ops. x and dy are 2-D here; `api.py` flattens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.ops.common.base import check_base, check_input
from lora_kernels.ops.common.checks import check_dtype, check_optional_vector
from lora_kernels.ops.common.flops import product


def check_linear(
    x: Tensor, base: Sequence[Tensor], meta: Sequence[int], bias: Tensor | None
) -> None:
    check_input(x, meta[1])
    check_base(x, base, meta)
    check_optional_vector("bias", bias, meta[0], x, [x.dtype])


@define("nf4_quantize", "(Tensor packed, Tensor absmax)", flops=None)
class NF4Quantize(NamedTuple):
    """The codes of w, two a byte, and the scale of each block."""

    w: Tensor
    block_size: int
    quant_type: int

    def fake(self) -> tuple[Tensor, Tensor]:
        n = self.w.numel()
        return (
            self.w.new_empty((n + 1) // 2, dtype=torch.uint8),
            self.w.new_empty((n + self.block_size - 1) // self.block_size, dtype=torch.float32),
        )


@define("nf4_quantize_scales", "(Tensor codes, Tensor nested_absmax)", flops=None)
class NF4QuantizeScales(NamedTuple):
    """The scales of a weight as codes of one byte, and the scale of each nested block."""

    absmax: Tensor
    nested_map: Tensor
    nested_offset: Tensor
    nested_block_size: int

    def check(self) -> None:
        """Called by every backend's `supports`, because no public function checks the arguments of
        this op."""
        check_dtype("absmax", self.absmax, [torch.float32])
        check_dtype("nested_map", self.nested_map, [torch.float32])
        check_dtype("nested_offset", self.nested_offset, [torch.float32])

    def fake(self) -> tuple[Tensor, Tensor]:
        self.check()
        blocks, size = self.absmax.numel(), self.nested_block_size
        return (
            self.absmax.new_empty(blocks, dtype=torch.uint8),
            self.absmax.new_empty((blocks + size - 1) // size),
        )


@define("nf4_dequantize", "Tensor", flops=None)
class NF4Dequantize(NamedTuple):
    """W [N, K] of a 4-bit base."""

    base: Sequence[Tensor]
    meta: Sequence[int]
    dtype: torch.dtype

    def fake(self) -> Tensor:
        return self.base[0].new_empty(tuple(self.meta[:2]), dtype=self.dtype)


def _fwd_flops(call: Any) -> int:
    return product(call.x[0], *call.meta[:2])


def _bwd_flops(call: Any) -> int:
    return product(call.dy[0], *call.meta[:2])


@define("nf4_linear_fwd", "Tensor", flops=_fwd_flops)
class NF4LinearForward(NamedTuple):
    """y = x·Wᵀ + bias."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    bias: Tensor | None

    def fake(self) -> Tensor:
        return self.x.new_empty((self.x.shape[0], self.meta[0]))


@define("nf4_linear_bwd", "Tensor", flops=_bwd_flops)
class NF4LinearBackward(NamedTuple):
    """dx = dy·W."""

    dy: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]

    def fake(self) -> Tensor:
        return self.dy.new_empty((self.dy.shape[0], self.meta[1]))
