"""nf4_linear_fwd and nf4_linear_bwd by the Triton kernels: the LoRA product without its branch."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.strategies import Problem, choose
from lora_kernels.ops.lora.triton.gemm import gemm
from lora_kernels.ops.nf4.schema import NF4LinearBackward, NF4LinearForward
from lora_kernels.ops.nf4.triton.base import Weight
from lora_kernels.ops.nf4.triton.product import product, product_t


def base_problem(x: Tensor, w: Weight) -> Problem:
    """The product x·Wᵀ without a branch, as the cost model sees it."""
    n, k = w.meta.n, w.meta.k
    return Problem(x.shape[0], n, k, 0, x.dtype, False, w.takes_tma(x), w.quantised)


def nf4_linear_fwd(c: NF4LinearForward) -> Tensor:
    """y = x·Wᵀ + bias, decoded in the product or a slab before it, as `strategies.py` says; of a
    dense W torch's own product, with its bits."""
    x, bias = c.x, c.bias
    w, device = Weight(c.base, c.meta), planned_device(x.device)
    if not w.quantised:
        return product(x, w, bias)
    plan = choose("lora_linear_fwd", base_problem(x, w), device)
    if plan.config is None:
        return product(x, w, bias)
    y = x.new_empty((x.shape[0], w.meta.n))
    gemm("base", plan.config, device, x, w, y, None, None, None, bias=bias, backward=False)
    return y


def nf4_linear_bwd(c: NF4LinearBackward) -> Tensor:
    """dx = dy·W, the same way."""
    dy, w, device = c.dy, Weight(c.base, c.meta), planned_device(c.dy.device)
    m = w.meta
    if not w.quantised:
        return product_t(dy, w)
    problem = Problem(dy.shape[0], m.n, m.k, 0, dy.dtype, False, w.takes_tma(dy), True)
    plan = choose("lora_linear_bwd", problem, device)
    if plan.config is None:
        return product_t(dy, w)
    dx = dy.new_empty((dy.shape[0], m.k))
    gemm("base", plan.config, device, dy, w, dx, None, None, None, backward=True)
    return dx
