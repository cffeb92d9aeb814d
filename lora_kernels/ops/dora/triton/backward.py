"""dora_linear_bwd by the Triton kernels: only what is asked, nothing by atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.strategies import MAX_ONE_READ_RANK
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.shrink import Projection, shrink
from lora_kernels.ops.common.triton.shrink_and_wgrad import Magnitude, grad_pass
from lora_kernels.ops.common.triton.shrink_and_wgrad import Projection as OneRead
from lora_kernels.ops.common.triton.wgrad import Gradient, wgrad
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.dora.magnitude import without_autocast
from lora_kernels.ops.dora.schema import DoRALinearBackward
from lora_kernels.ops.dora.triton.dropout import mask_words
from lora_kernels.ops.dora.triton.forward import plan_config
from lora_kernels.ops.dora.triton.linear import gemm
from lora_kernels.ops.dora.triton.scale import output_scales
from lora_kernels.ops.lora.schema import DropoutMask
from lora_kernels.ops.lora.triton.dropout import dropout_mask


@without_autocast
def dora_linear_bwd(c: DoRALinearBackward) -> tuple[Tensor, ...]:
    """The derivation stands in `api.py`: dy is read once for all but dx (and dW)."""
    dy, x, s, a, b, w = c.dy, c.x, c.s, c.a, c.b, Weight(c.base, c.meta)
    magnitude, norm, scale = c.magnitude, c.norm, c.scale
    m, n, r = dy.shape[0], dy.shape[1], a.shape[0]
    k = x.shape[1]
    want_x, want_a, want_b, want_magnitude, want_bias, want_w = c.needs
    dropout = Dropout(c.dropout_p, c.seed, 0)
    device = planned_device(dy.device)
    dx, da, db, dmagnitude, dbias, dw = c.fake()
    columns = want_b or want_magnitude or want_bias
    want_ds = want_x or want_a
    ds_in_pass = want_ds and columns and r <= MAX_ONE_READ_RANK and n > 0
    # For ds m̂ ∘ b is rounded already: what rounding ds itself takes is kept, beside it or in it.
    half = dy.dtype == torch.float16
    if dy.dtype == torch.bfloat16:
        ds, residual = dy.new_empty((2, m, r))
    else:
        ds, residual = dy.new_empty((m, r), dtype=torch.float32), None
    scales = dy.new_empty(n, dtype=torch.float32)  # m̂
    if columns:
        read = OneRead(
            dy, s, b, ds if ds_in_pass else None, db if want_b else None,
            dbias if want_bias else None, scale, scale, residual=residual if ds_in_pass else None,
        )  # fmt: skip
        kept = (c.u, dmagnitude) if want_magnitude else (None, None)
        grad_pass([read], dora=Magnitude(magnitude, norm, scales, *kept))
    elif n:
        output_scales(magnitude, norm, scales)
    if want_ds and not ds_in_pass:
        shrink(dy, [Projection(b, ds, scale, residual=residual)], row=scales, whole=half)
    if want_x:
        gemm(
            plan_config(dy, w, k, r, device, dropout=dropout.on, backward=True),
            device,
            dy,
            w,
            dx,
            None,
            ds,
            a,
            residual=residual,
            whole=half,
            magnitude=None,
            norm=None,
            row=scales,
            mask=mask_words(dropout, x) if dropout.on else None,
            bias=None,
            scale=1.0,
            dropout=dropout,
            backward=True,
        )
    if want_a:
        wgrad(x, [Gradient(ds, da, dropout.stream, residual)], dropout, whole=half)
    if want_w:
        dw = _weight_grad(dy, x, scales, c.dropout_p, dropout)
    return dx, da, db, dmagnitude, dbias, dw


def _weight_grad(
    dy: Tensor, x: Tensor, scales: Tensor, dropout_p: float, dropout: Dropout
) -> Tensor:
    """dzᵀ·xd + dyᵀ·(x − xd) = dyᵀ·x + (dz − dy)ᵀ·xd by the vendor's products."""
    if not dropout.on:
        return executor().product((dy * scales).to(dy.dtype).T, x)
    assert dropout.seed is not None
    mask = dropout_mask(
        DropoutMask(dropout.seed, x.shape[0], x.shape[1], dropout_p, dropout.stream)
    )
    moved = (dy * ((scales - 1.0) * dropout.keep_scale)).to(dy.dtype)
    whole = executor().product(dy.T, x)
    return whole.add_(executor().product(moved.T, x * mask))
