"""Products with a base weight and no adapter: x·Wᵀ, and dy·W for the gradient of x.

A dense weight goes to the vendor's GEMM. A 4-bit one is decoded inside our own GEMM, or a slab at a
time for the vendor's: the cost model in `strategies.py` says which.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.strategies import WORKSPACE_BYTES, choose
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.dequantize import CHUNK, dequantize_slab
from lora_kernels.ops.common.triton.linear import gemm


def base_problem(x: Tensor, w: Weight) -> Problem:
    """The product x·Wᵀ without an adapter, as the cost model sees it."""
    n, k = w.meta.n, w.meta.k
    return Problem(x.shape[0], n, k, 0, x.dtype, False, w.takes_tma(x), w.quantised)


def base_product(x: Tensor, w: Weight, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias. A dense W gives the bits of torch's own product."""
    if not w.quantised:
        return vendor_product(x, w, bias)
    device = planned_device(x.device)
    plan = choose("lora_linear_fwd", base_problem(x, w), device)
    if plan.config is None:
        return vendor_product(x, w, bias)
    y = x.new_empty((x.shape[0], w.meta.n))
    gemm("base", plan.config, device, x, w, y, None, None, None, bias=bias, backward=False)
    return y


def base_product_t(dy: Tensor, w: Weight) -> Tensor:
    """dy·W."""
    if not w.quantised:
        return vendor_product_t(dy, w)
    device, m = planned_device(dy.device), w.meta
    problem = Problem(dy.shape[0], m.n, m.k, 0, dy.dtype, False, w.takes_tma(dy), True)
    plan = choose("lora_linear_bwd", problem, device)
    if plan.config is None:
        return vendor_product_t(dy, w)
    dx = dy.new_empty((dy.shape[0], m.k))
    gemm("base", plan.config, device, dy, w, dx, None, None, None, backward=True)
    return dx


def vendor_product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + bias by the vendor's GEMM."""
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


def vendor_product_t(dy: Tensor, weight: Weight) -> Tensor:
    """dy·W by the vendor's GEMM. The slabs are columns of W: each gradient is one sum, rounded
    once."""
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
    """How many rows or columns of `each` bytes fit the workspace, in whole chunks."""
    fit = max(1, WORKSPACE_BYTES // max(1, each))
    return max(1, count) if fit >= count else max(CHUNK, fit // CHUNK * CHUNK)
