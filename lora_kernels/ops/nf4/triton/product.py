"""The vendor's products with a base weight; a 4-bit one is decoded a slab at a time."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.launch import executor
from lora_kernels.ops.common.strategies import WORKSPACE_BYTES
from lora_kernels.ops.nf4.triton.base import Weight
from lora_kernels.ops.nf4.triton.codec import CHUNK, dequantize_slab


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias."""
    if not weight.quantised:
        return executor().product(x, weight.base[0].T, bias)
    n, k = weight.meta.n, weight.meta.k
    y = x.new_empty((x.shape[0], n))
    rows = _slab(n, k * x.element_size())
    for first in range(0, n, rows):
        here = slice(first, min(first + rows, n))
        w = dequantize_slab(weight, here, slice(0, k), x.dtype)
        executor().product(x, w.T, None if bias is None else bias[here], y[:, here])
    return y


def product_t(dy: Tensor, weight: Weight) -> Tensor:
    """dy·W. The slabs are columns of W: each gradient is one sum, rounded once."""
    if not weight.quantised:
        return executor().product(dy, weight.base[0])
    n, k = weight.meta.n, weight.meta.k
    dx = dy.new_empty((dy.shape[0], k))
    columns = _slab(k, n * dy.element_size())
    for first in range(0, k, columns):
        here = slice(first, min(first + columns, k))
        w = dequantize_slab(weight, slice(0, n), here, dy.dtype)
        executor().product(dy, w, None, dx[:, here])
    return dx


def _slab(count: int, each: int) -> int:
    """Rows or columns of `each` bytes in a workspace, in whole chunks."""
    fit = max(1, WORKSPACE_BYTES // max(1, each))
    return max(1, count) if fit >= count else max(CHUNK, fit // CHUNK * CHUNK)
