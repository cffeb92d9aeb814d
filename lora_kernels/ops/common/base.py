"""How a base weight, dense or 4-bit, travels through an op's schema: `Tensor[] base, int[] meta`.

dense   base = [w[N, K]]                                        meta = [N, K]
4-bit   base = [packed, absmax]                                 meta = [N, K, block_size,
        base = [packed, absmax, nested_absmax, nested_map,              quant_type,
                nested_offset] when the scales are quantised            nested_block_size]

`packed` is u8 [(N*K + 1) // 2], high nibble first over the row-major weight. `absmax` is fp32 with
one scale per block of `block_size` elements, or u8 codes into `nested_map` (fp32 [256]) whose own
scales `nested_absmax` (fp32) cover `nested_block_size` codes each; `nested_offset` is fp32 [1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape

QUANT_TYPES = ("nf4", "fp4")
COMPONENTS = ("packed", "absmax", "nested_absmax", "nested_map", "nested_offset")
COMPONENT_LABELS = tuple(f"qweight.{name}" for name in COMPONENTS)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Meta(NamedTuple):
    """`meta` of a base weight; the last three fields are 0 for a dense one."""

    n: int
    k: int
    block_size: int = 0
    quant_type: int = 0
    nested_block_size: int = 0

    @property
    def is_dense(self) -> bool:
        return self.block_size == 0

    @property
    def is_nested(self) -> bool:
        return self.nested_block_size > 0

    @property
    def blocks(self) -> int:
        return -(-self.n * self.k // self.block_size)


def check_block_size(name: str, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(
            f"{name}: got {block_size}, expected a power of two from {BLOCK_SIZES[0]} to "
            f"{BLOCK_SIZES[-1]}"
        )


def check_base(x: Tensor, base: Sequence[Tensor], meta: Sequence[int]) -> None:
    """Check that a base weight goes with the input x: dtype of a dense one, and device.

    The components of a 4-bit weight are checked against each other by `NF4Weight.check`.
    """
    if len(base) == 1:
        check_shape("weight", base[0], [meta[0], meta[1]])
        check_device("weight", base[0], x.device)
        check_dtype("weight", base[0], [x.dtype])
    else:
        check_device("qweight", base[0], x.device)


def check_quantised(
    base: Sequence[Tensor], m: Meta, labels: Sequence[str] = COMPONENT_LABELS
) -> None:
    """Check the component tensors of a 4-bit weight against its meta; `labels` name them."""
    check_block_size("block_size", m.block_size)
    if m.quant_type not in (0, 1):
        raise ValueError(f"quant_type: got {m.quant_type}, expected 0 (nf4) or 1 (fp4)")
    if len(base) != (5 if m.is_nested else 2):
        raise ValueError(f"qweight: got {len(base)} tensors, expected {5 if m.is_nested else 2}")
    sizes = [(torch.uint8, (m.n * m.k + 1) // 2)]
    if m.is_nested:
        sizes.append((torch.uint8, m.blocks))
        sizes.append((torch.float32, -(-m.blocks // m.nested_block_size)))
        sizes += [(torch.float32, 256), (torch.float32, 1)]
    else:
        sizes.append((torch.float32, m.blocks))
    for label, t, (dtype, size) in zip(labels, base, sizes, strict=False):
        _check_component(label, t, dtype, size)
        check_device(label, t, base[0].device)


def _check_component(name: str, t: Tensor, dtype: torch.dtype, size: int) -> None:
    check_dtype(name, t, [dtype])
    check_shape(name, t, [size])
    if not t.is_contiguous():
        raise ValueError(f"{name}: has stride {list(t.stride())}, expected contiguous")


def check_input(x: Tensor, k: int) -> None:
    check_dtype("x", x, FLOATS)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., {k}] as the weight has")
