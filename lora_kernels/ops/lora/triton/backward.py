"""lora_linear_bwd by the Triton kernels: only what is asked, nothing by atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.strategies import MAX_ONE_READ_RANK, choose
from lora_kernels.ops.common.triton.base_product import vendor_product_t
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.linear import gemm
from lora_kernels.ops.common.triton.shrink import Projection, shrink
from lora_kernels.ops.common.triton.shrink_and_wgrad import Projection as OneRead
from lora_kernels.ops.common.triton.shrink_and_wgrad import grad_pass
from lora_kernels.ops.common.triton.wgrad import Beside, Gradient, wgrad
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.lora.schema import LoRALinearBackward
from lora_kernels.ops.lora.triton.diagonals import diagonals as diagonal_grads
from lora_kernels.ops.lora.triton.forward import ADD_CONFIG


def lora_linear_bwd(c: LoRALinearBackward) -> tuple[Tensor, ...]:
    """The derivation stands in `api.py`; which launches, `strategies.py` says."""
    dy, x, s, a, b, scale, w = c.dy, c.x, c.s, c.a, c.b, c.scale, Weight(c.base, c.meta)
    rank_diag, out_diag = c.rank_diag, c.out_diag
    m, n, k, r = dy.shape[0], dy.shape[1], x.shape[1], a.shape[0]
    want_x, want_a, want_b, want_bias, want_rank, want_out, want_w = c.needs
    dropout = Dropout(c.dropout_p, c.seed, c.stream)
    device = planned_device(dy.device)
    problem = Problem(m, n, k, r, dy.dtype, dropout.on, w.takes_tma(dy), w.quantised)
    plan = choose("lora_linear_bwd", problem, device)
    grads = [dy.new_empty(0, dtype=dtype) for dtype in c.dtypes]
    if want_a:
        grads[1] = torch.empty_like(a, memory_format=torch.contiguous_format)
    if want_b:
        grads[2] = torch.empty_like(b, memory_format=torch.contiguous_format)
    if want_bias:
        grads[3] = dy.new_empty(n)

    # dB and the diagonals' gradients share g = dyᵀ·s; with diagonals g itself is needed.
    diagonals = want_rank or want_out or (want_b and (rank_diag, out_diag) != (None, None))
    g = dy.new_empty((n, r), dtype=torch.float32) if diagonals else None
    outer_b = g if diagonals else grads[2] if want_b else None
    factor_b = 1.0 if diagonals else scale
    dbias = grads[3] if want_bias else None

    ds = dy.new_empty((m, r), dtype=rank_dtype(dy.dtype))
    made_ds, made_b = not (want_x or want_a), False
    if not made_ds and not (want_x and plan.strategy == "single_pass" and k > 0):
        made_ds = True
        if outer_b is not None and r <= MAX_ONE_READ_RANK and m > 0:
            made_b = True
            made = OneRead(dy, s, b, ds, outer_b, dbias, scale, factor_b, rank_diag)
            grad_pass([made], out=out_diag)
        else:
            shrink(dy, [Projection(b, ds, scale, rank_diag)], row=out_diag)
    if want_x:
        grads[0] = vendor_product_t(dy, w) if plan.strategy == "addmm" else dy.new_empty((m, k))
        gemm(
            plan.strategy,
            plan.config or ADD_CONFIG,
            device,
            dy,
            w,
            grads[0],
            ds,
            a,
            b,
            scale=scale,
            dropout=dropout,
            bias=None,
            rank_diag=rank_diag,
            out_diag=out_diag,
            backward=True,
        )
    rest_b = None if made_b else outer_b
    if want_a or rest_b is not None:
        mine = [Gradient(ds, grads[1], dropout.stream)] if want_a else []
        wgrad(x, mine, dropout, None if rest_b is None else Beside(dy, s, rest_b, dbias, factor_b))
    if want_bias and outer_b is None:
        torch.sum(dy, 0, out=grads[3])
    if g is not None:
        if want_rank:
            grads[4] = dy.new_empty(r, dtype=grads[4].dtype)
        if want_out:
            grads[5] = dy.new_empty(n, dtype=grads[5].dtype)
        diagonal_grads(
            g,
            b,
            rank_diag,
            out_diag,
            grads[2] if want_b else None,
            grads[4] if want_rank else None,
            grads[5] if want_out else None,
            scale,
        )
    if want_w:
        grads[6] = executor().product(dy.T, x)
    return tuple(grads)
