"""lora_linear_fwd and dropout_mask by the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.strategies import choose
from lora_kernels.ops.common.triton.base_product import vendor_product
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.linear import gemm
from lora_kernels.ops.common.triton.shrink import Projection, shrink
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.lora.schema import LoRALinearForward

# The pass that adds the branch to the vendor's product.
ADD_CONFIG = GemmConfig(64, 64, 16, 4, 1)


def lora_linear_fwd(c: LoRALinearForward) -> tuple[Tensor, Tensor]:
    """y [M, N] and s [M, R]; which launches, `strategies.py` says."""
    x, a, w = c.x, c.a, Weight(c.base, c.meta)
    m, k, n, r = x.shape[0], x.shape[1], c.meta[0], a.shape[0]
    dropout = Dropout(c.dropout_p, c.seed, c.stream)
    device = planned_device(x.device)
    s = x.new_empty((m, r), dtype=rank_dtype(x.dtype))
    problem = Problem(m, n, k, r, x.dtype, dropout.on, w.takes_tma(x), w.quantised)
    plan = choose("lora_linear_fwd", problem, device)
    if plan.strategy != "single_pass" or n == 0:
        shrink(x, [Projection(a.T, s, dropout.keep_scale)], dropout=dropout)
    if plan.strategy == "addmm":
        y = vendor_product(x, w)
    else:
        y = x.new_empty((m, n))
    gemm(
        plan.strategy,
        plan.config or ADD_CONFIG,
        device,
        x,
        w,
        y,
        s,
        a,
        c.b,
        scale=c.scale,
        dropout=dropout,
        bias=c.bias,
        rank_diag=c.rank_diag,
        out_diag=c.out_diag,
        backward=False,
    )
    return y, s
