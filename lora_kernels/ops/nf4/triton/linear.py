"""nf4_linear_fwd and nf4_linear_bwd by the Triton kernels: the base's product alone."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.triton.base_product import base_product, base_product_t
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.nf4.schema import NF4LinearBackward, NF4LinearForward


def nf4_linear_fwd(c: NF4LinearForward) -> Tensor:
    """y = x·Wᵀ + bias."""
    return base_product(c.x, Weight(c.base, c.meta), c.bias)


def nf4_linear_bwd(c: NF4LinearBackward) -> Tensor:
    """dx = dy·W."""
    return base_product_t(c.dy, Weight(c.base, c.meta))
