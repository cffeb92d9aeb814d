"""lora_packed_bwd by the Triton kernels: dx is summed once, x read once for every dA."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, gemm_tiles, thin_columns, thin_rows
from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.strategies import Problem
from lora_kernels.ops.common.thin.outer import outer
from lora_kernels.ops.common.thin.shrink import shrink
from lora_kernels.ops.common.triton_host import Dropout, descriptor, precision, run
from lora_kernels.ops.packed.schema import rank_slices, unpack_needs
from lora_kernels.ops.packed.triton.forward import PER_LAUNCH, groups, numbered, plan_config
from lora_kernels.ops.packed.triton.gemm import _packed_grad_x_kernel
from lora_kernels.ops.packed.triton.thin import _packed_grad_a_kernel


def lora_packed_bwd(
    dy: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The derivation stands in `api.py`."""
    m, k = x.shape
    want_x, wants = unpack_needs(needs, len(a))
    columns = list(rank_slices(a))
    device = planned_device(x.device)
    ds = x.new_empty((m, columns[-1].stop))
    dx = x.new_empty((m, k) if want_x else 0)
    da = [_empty(t, want[0]) for t, want in zip(a, wants, strict=True)]
    for group in groups(len(a)):
        part = slice(group.start, group.stop)
        own = ds[:, columns[group.start].start : columns[group[-1]].stop]
        dropout = Dropout(dropout_p, seed, group.start)
        r = max(t.shape[0] for t in a[part])
        strategy, config = plan_config("lora_linear_bwd", dy[part], base[part], r, dropout.on)
        single_pass = want_x and strategy == "single_pass" and k > 0
        if not single_pass and (want_x or any(want[0] for want in wants[part])):
            for i in group:
                thin = thin_rows(m, dy[i].shape[1], device, _block_r(a[i]), x.element_size())
                none = Dropout(0.0, None, 0)
                shrink(thin, dy[i], b[i], ds[:, columns[i]], factor=scales[i], dropout=none)
        if want_x:
            more = x.new_empty((m, k)) if group.start else dx
            _grad_x(
                dy[part], base[part], more, own, a[part], b[part], scales[part], dropout, config,
                single_pass,
            )  # fmt: skip
            if group.start:
                dx += more
        if any(want[0] for want in wants[part]):
            _grad_a(x, own, a[part], [da[i] if wants[i][0] else None for i in group], dropout)

    db = [_empty(t, want[1]) for t, want in zip(b, wants, strict=True)]
    dbias = [x.new_empty(w.shape[0] if want[2] else 0) for w, want in zip(base, wants, strict=True)]
    for i, (_, want_b, want_bias, _) in enumerate(wants):
        if want_b:
            n = dy[i].shape[1]
            outer(
                thin_columns(m, n, device, _block_r(a[i]), x.element_size()),
                None,
                None,
                dy[i],
                s[:, columns[i]],
                None,
                db[i],
                dbias[i] if want_bias else None,
                factor_b=scales[i],
                dropout=Dropout(0.0, None, 0),
            )
        elif want_bias:
            torch.sum(dy[i], 0, out=dbias[i])
    dw = [
        executor().product(g.T, x) if want[3] else x.new_empty(0)
        for g, want in zip(dy, wants, strict=True)
    ]
    return dx, da, db, dbias, dw


def _empty(t: Tensor, wanted: bool) -> Tensor:
    return t.new_empty(t.shape if wanted else 0)


def _block_r(a: Tensor) -> int:
    return Problem(1, 1, 1, a.shape[0]).block_r


def _grad_x(
    dy: Sequence[Tensor],
    weights: Sequence[Tensor],
    dx: Tensor,
    ds: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    dropout: Dropout,
    config: GemmConfig,
    single_pass: bool,
) -> None:
    """dx in one launch; ds is made there where single_pass, and read otherwise."""
    m, k = dx.shape
    tiles = gemm_tiles(config, m, k)
    device = planned_device(dx.device)
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    dy_box, box = [config.block_m, config.block_k], [config.block_k, config.block_n]
    run(
        _packed_grad_x_kernel,
        (programs,),
        config.warps,
        config.stages,
        p_dx=dx,
        p_ds=ds,
        p_seed=dropout.seed,
        M=m,
        N=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_ds=ds.stride(0),
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        TMA=config.tma,
        EVEN_K=all(t.shape[1] % config.block_k == 0 for t in dy),
        PRECISION=precision(dx.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=max(_block_r(t) for t in a),
        GROUP=config.group,
        **numbered(
            [
                {
                    "dy": descriptor(t, dy_box) if config.tma else t,
                    "w": descriptor(weights[i], box) if config.tma else weights[i],
                    "p_q": b[i],
                    "p_u": a[i],
                    "K": t.shape[1],
                    "R": a[i].shape[0],
                    "scale": float(scales[i]),
                    "stride_dym": t.stride(0),
                    "stride_dyn": t.stride(1),
                    "stride_wk": weights[i].stride(0),
                    "stride_wn": weights[i].stride(1),
                    "stride_qk": b[i].stride(0),
                    "stride_qr": b[i].stride(1),
                    "stride_ur": a[i].stride(0),
                    "stride_un": a[i].stride(1),
                }
                for i, t in enumerate(dy)
            ],
            {
                **dict.fromkeys(("dy", "w", "p_q", "p_u")),
                **dict.fromkeys(("K", "R", "stride_dym", "stride_dyn", "stride_wk"), 0),
                **dict.fromkeys(("stride_wn", "stride_qk", "stride_qr", "stride_ur"), 0),
                "stride_un": 0,
                "scale": 0.0,
            },
        ),
    )


def _grad_a(
    x: Tensor, ds: Tensor, a: Sequence[Tensor], da: Sequence[Tensor | None], dropout: Dropout
) -> None:
    """Every da_i that is asked, in one pass over x."""
    m, k = x.shape
    br = max(_block_r(t) for t in a)
    config = thin_columns(m, k, planned_device(x.device), br, x.element_size())
    absent = PER_LAUNCH - len(a)
    ranks = [t.shape[0] for t in a] + [0] * absent
    outputs = [*da, *([None] * absent)]
    run(
        _packed_grad_a_kernel,
        (ceil(k / config.block), ceil(max(ranks) / br)),
        config.warps,
        min(config.stages, 3),
        p_x=x,
        p_ds=ds,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ds=ds.stride(0),
        DROPOUT=dropout.on,
        PRECISION=precision(x.dtype),
        BC=config.block,
        BM=config.step,
        BR=br,
        **{f"R_{i}": r for i, r in enumerate(ranks)},
        **{f"p_da_{i}": t for i, t in enumerate(outputs)},
    )
