"""dora_linear_bwd by the Triton kernels: only what is asked, nothing by atomics."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import Device, span_of, thin_columns, thin_rows
from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.strategies import MAX_ONE_READ_RANK, block_rank, one_read_parts
from lora_kernels.ops.common.thin.outer import outer
from lora_kernels.ops.common.thin.shrink import shrink
from lora_kernels.ops.common.triton_host import Dropout, precision, run, stride
from lora_kernels.ops.dora.magnitude import without_autocast
from lora_kernels.ops.dora.schema import DoRALinearBackward
from lora_kernels.ops.dora.triton.dropout import mask_words
from lora_kernels.ops.dora.triton.forward import plan_config
from lora_kernels.ops.dora.triton.gemm import gemm
from lora_kernels.ops.dora.triton.kernels import _scale_kernel
from lora_kernels.ops.dora.triton.thin import _dora_finish_kernel, _dora_pass_kernel
from lora_kernels.ops.lora.schema import DropoutMask
from lora_kernels.ops.lora.triton.forward import dropout_mask
from lora_kernels.ops.nf4.triton.base import Weight

_OFF = Dropout(0.0, None, 0)
_SUM_BLOCK = 512  # four elements a thread: each fp32 load is 16 bytes beside its neighbour's


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
    size, br = dy.element_size(), block_rank(r)
    dx, da, db, dmagnitude, dbias, dw = c.fake()
    columns = want_b or want_magnitude or want_bias
    want_ds = want_x or want_a
    ds_in_pass = want_ds and columns and r <= MAX_ONE_READ_RANK and n > 0
    # For ds m̂ ∘ b is rounded already: what rounding ds itself takes is kept, beside it or in it.
    half = dy.dtype == torch.float16
    if dy.dtype == torch.bfloat16:
        ds, rest = dy.new_empty((2, m, r))
    else:
        ds, rest = dy.new_empty((m, r), dtype=torch.float32), None
    scales = dy.new_empty(n, dtype=torch.float32)  # m̂
    if columns:
        _columns(
            dy, s, b, magnitude, norm, c.u if want_magnitude else None, scales,
            (ds, rest) if ds_in_pass else None,
            db if want_b else None, dmagnitude if want_magnitude else None,
            dbias if want_bias else None, scale, device,
        )  # fmt: skip
    elif n:
        _scales(magnitude, norm, scales)
    if want_ds and not ds_in_pass:
        config = thin_rows(m, n, device, br, size)
        shrink(config, dy, b, ds, factor=scale, dropout=_OFF, row=scales, rest=rest, whole=half)
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
            rest=rest,
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
        config = thin_columns(m, k, device, br, size)
        outer(
            config, x, ds, None, None, da, None, None, factor_b=1.0, dropout=dropout, rest=rest,
            whole=half,
        )  # fmt: skip
    if want_w:
        dw = _weight_grad(dy, x, scales, c.dropout_p, dropout)
    return dx, da, db, dmagnitude, dbias, dw


def _scales(magnitude: Tensor, norm: Tensor, out: Tensor) -> None:
    """m̂ [N] in fp32."""
    run(
        _scale_kernel,
        (ceil(out.numel() / _SUM_BLOCK),),
        4,
        1,
        p_magnitude=magnitude,
        p_norm=norm,
        p_out=out,
        N=out.numel(),
        stride_magnitude=magnitude.stride(0),
        stride_norm=norm.stride(0),
        BN=_SUM_BLOCK,
    )


def _columns(
    dy: Tensor,
    s: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    kept: Tensor | None,
    scales: Tensor,
    sums: tuple[Tensor, Tensor | None] | None,
    db: Tensor | None,
    dmagnitude: Tensor | None,
    dbias: Tensor | None,
    scale: float,
    device: Device,
) -> None:
    """One read of dy, and of kept where given, for m̂, db, dmagnitude, dbias and the sums ds, with
    what rounding takes from them, where given."""
    ds, rest = sums or (None, None)
    m, n = dy.shape
    r = b.shape[1]
    size, br = dy.element_size(), block_rank(r)
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    rows = max(m, 1)
    parts_n, parts_m = one_read_parts(rows, max(n, 1), device, bn)
    span = span_of(rows, parts_m, bm)
    parts_m = ceil(rows / span)

    def parts(wanted: object, *shape: int) -> Tensor | None:
        return None if wanted is None else dy.new_empty(shape, dtype=torch.float32)

    parts_ds, parts_g = parts(ds, parts_n, m, r), parts(db, parts_m, n, r)
    parts_bias, parts_dots = parts(dbias, parts_m, n), parts(kept, parts_m, n)
    run(
        _dora_pass_kernel,
        (ceil(n / bn), parts_m, 1 if db is None else ceil(r / br)),
        8 if bn == 256 else 4,
        1,  # products and lanes read the same tile: see `tiles.in_registers`
        p_dy=dy,
        p_kept=kept,
        p_s=s,
        p_b=b,
        p_magnitude=magnitude,
        p_norm=norm,
        p_m=scales,
        p_ds=parts_ds,
        p_g=parts_g,
        p_dbias=parts_bias,
        p_dots=parts_dots,
        M=m,
        N=n,
        R=r,
        span=span,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_km=stride(kept, 0),
        stride_kn=stride(kept, 1),
        stride_sm=s.stride(0),
        stride_sr=s.stride(1),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        stride_magnitude=magnitude.stride(0),
        stride_norm=norm.stride(0),
        EVEN_N=n % bn == 0,
        PRECISION=precision(dy.dtype),
        BM=bm,
        BN=bn,
        BR=br,
    )
    block = 16  # with more columns, or ranks at a time, a thread spills
    blocks = ceil(n / block)
    elements = 0 if ds is None else ds.numel()
    run(
        _dora_finish_kernel,
        (blocks + ceil(elements / _SUM_BLOCK),),
        4,
        2,
        p_parts_ds=parts_ds,
        p_ds=ds,
        p_rest=rest,
        p_g=parts_g,
        p_db=db,
        p_parts_bias=parts_bias,
        p_dbias=dbias,
        p_dots=parts_dots,
        p_dmagnitude=dmagnitude,
        p_magnitude=magnitude,
        p_norm=norm,
        N=n,
        R=r,
        size_ds=elements,
        parts_ds=parts_n,
        parts=parts_m,
        scale=float(scale),
        stride_magnitude=magnitude.stride(0),
        stride_norm=norm.stride(0),
        blocks=blocks,
        BN=block,
        BR=16,
        SUM_BLOCK=_SUM_BLOCK,
    )


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
