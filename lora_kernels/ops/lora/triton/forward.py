"""lora_linear_fwd and dropout_mask by the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, thin_rows
from lora_kernels.ops.common.launch import Launch, executor, planned_device
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.common.strategies import Problem, choose
from lora_kernels.ops.common.thin.shrink import shrink
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.lora.triton.dropout import _dropout_mask_kernel
from lora_kernels.ops.lora.triton.gemm import gemm
from lora_kernels.ops.nf4.triton.base import Weight
from lora_kernels.ops.nf4.triton.product import product

# The pass that adds the branch to the vendor's product.
ADD_CONFIG = GemmConfig(64, 64, 16, 4, 1)


def lora_linear_fwd(
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
) -> tuple[Tensor, Tensor]:
    """y [M, N] and s [M, R]; which launches, `strategies.py` says."""
    w = Weight(base, meta)
    m, k, n, r = x.shape[0], x.shape[1], meta[0], a.shape[0]
    dropout = Dropout(dropout_p, seed, stream)
    device = planned_device(x.device)
    s = x.new_empty((m, r))
    problem = Problem(m, n, k, r, x.dtype, dropout.on, w.takes_tma(x), w.quantised)
    plan = choose("lora_linear_fwd", problem, device)
    if plan.strategy != "single_pass" or n == 0:
        shrink(
            thin_rows(m, k, device, problem.block_r, x.element_size()),
            x,
            a.T,
            s,
            factor=dropout.keep_scale,
            dropout=dropout,
        )
    if plan.strategy == "addmm":
        y = product(x, w)
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
        b,
        scale=scale,
        dropout=dropout,
        bias=bias,
        rank_diag=rank_diag,
        out_diag=out_diag,
        backward=False,
    )
    return y, s


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> Tensor:
    """The boolean keep mask [rows, cols]."""
    out = torch.empty((rows, cols), dtype=torch.bool, device=seed.device)
    if out.numel():
        args = {
            "p_seed": seed,
            "p_out": out.view(torch.uint8),
            "M": rows,
            "K": cols,
            "threshold": threshold(p),
            "stream": stream,
            "BM": 16,
            "BK": 128,
        }
        grid = (ceil(rows / 16), ceil(cols / 128))
        executor().run(Launch(_dropout_mask_kernel, grid, args, warps=4, stages=1))
    return out
