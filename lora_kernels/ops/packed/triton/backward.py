"""lora_packed_bwd by the Triton kernels: dx is summed once, x read once for every dA."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, gemm_tiles, thin_columns
from lora_kernels.ops.common.launch import executor, planned_device
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.strategies import block_rank
from lora_kernels.ops.common.triton_host import Dropout, descriptor, precision, run
from lora_kernels.ops.lora.triton.backward import lora_linear_bwd
from lora_kernels.ops.nf4.triton.base import Weight
from lora_kernels.ops.packed.schema import LoRAPackedBackward, rank_slices
from lora_kernels.ops.packed.triton.gemm import _packed_grad_x_kernel
from lora_kernels.ops.packed.triton.grad_pass import packed_grad_pass
from lora_kernels.ops.packed.triton.groups import groups, numbered, split_weights, weight_args
from lora_kernels.ops.packed.triton.plan import plan_config
from lora_kernels.ops.packed.triton.thin import _packed_grad_a_kernel


def lora_packed_bwd(
    c: LoRAPackedBackward,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The derivation stands in `api.py`."""
    dy, x, s, a, b, scales = c.dy, c.x, c.s, c.a, c.b, c.scales
    m, k = x.shape
    weights = split_weights(c.base, c.meta)
    want_x, wants = c.want
    columns = list(rank_slices(a))
    s = s if s.stride(1) == 1 else s.contiguous()
    dx = x.new_empty(0)
    da = [_empty(t, want[0]) for t, want in zip(a, wants, strict=True)]
    db = [_empty(t, want[1]) for t, want in zip(b, wants, strict=True)]
    dbias = [x.new_empty(t.shape[0] if want[2] else 0) for t, want in zip(b, wants, strict=True)]
    for group in groups(weights):
        part = slice(group.start, group.stop)
        dropout = Dropout(c.dropout_p, c.seed, group.start)
        r = max(t.shape[0] for t in a[part])
        planned = plan_config("lora_linear_bwd", dy[part], weights[part], r, dropout.on)
        if planned is None:
            for i in group:
                one = c.one(i, weights[i].base, weights[i].meta, s[:, columns[i]])
                asked = [*one.needs[:-1], False]  # dW is made below
                more, da[i], db[i], dbias[i], *_ = lora_linear_bwd(one._replace(needs=asked))
                dx = dx.add_(more) if i else more
            continue
        strategy, config = planned
        single_pass = want_x and strategy == "single_pass" and k > 0
        want_a = any(want[0] for want in wants[part])
        # One after the other, the rows of each whole.
        flat = x.new_empty(m * sum(t.shape[0] for t in a[part]), dtype=rank_dtype(x.dtype))
        ds = list(flat.split([m * t.shape[0] for t in a[part]]))
        made = single_pass or not (want_x or want_a)
        for asked_b in (True, False):
            some = [i for i in group if wants[i][1] == asked_b]
            if not some or (made and not asked_b):
                continue
            # A bias's gradient without dB's is a sum of torch.
            asked_bias = asked_b and any(wants[i][2] for i in some)
            packed_grad_pass(
                [dy[i] for i in some],
                [s[:, columns[i]] for i in some],
                [b[i] for i in some],
                [scales[i] for i in some],
                None if made else [ds[i - group.start] for i in some],
                [db[i] for i in some] if asked_b else None,
                [dbias[i] if wants[i][2] else x.new_empty(dy[i].shape[1]) for i in some]
                if asked_bias
                else None,
            )
        if want_x:
            more = x.new_empty((m, k))
            _grad_x(
                dy[part], weights[part], more, flat, a[part], b[part], scales[part], dropout,
                config, single_pass,
            )  # fmt: skip
            dx = dx.add_(more) if group.start else more
        if want_a:
            _grad_a(x, flat, a[part], [da[i] if wants[i][0] else None for i in group], dropout)
        for i in group:
            if wants[i][2] and not wants[i][1]:
                torch.sum(dy[i], 0, out=dbias[i])

    dw = [
        executor().product(g.T, x) if want[3] else x.new_empty(0)
        for g, want in zip(dy, wants, strict=True)
    ]
    return dx, da, db, dbias, dw


def _empty(t: Tensor, wanted: bool) -> Tensor:
    return t.new_empty(t.shape if wanted else 0)


def _grad_x(
    dy: Sequence[Tensor],
    weights: Sequence[Weight],
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
    box = [config.block_m, config.block_k]
    format_args, own_args = weight_args(weights, config, backward=True)
    run(
        _packed_grad_x_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        p_dx=dx,
        p_ds=ds,
        p_seed=dropout.seed,
        M=m,
        N=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        count=len(dy),
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        TMA=config.tma,
        EVEN_K=all(t.shape[1] % config.block_k == 0 for t in dy),
        PRECISION=precision(dx.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=block_rank(max(t.shape[0] for t in a)),
        GROUP=config.group,
        **format_args,
        **numbered(
            [
                {
                    **own_args[i],
                    "dy": descriptor(t, box) if config.tma else t,
                    "p_q": b[i],
                    "p_u": a[i],
                    "K": t.shape[1],
                    "R": a[i].shape[0],
                    "scale": float(scales[i]),
                    "stride_dym": t.stride(0),
                    "stride_dyn": t.stride(1),
                    "stride_qk": b[i].stride(0),
                    "stride_qr": b[i].stride(1),
                    "stride_ur": a[i].stride(0),
                    "stride_un": a[i].stride(1),
                }
                for i, t in enumerate(dy)
            ]
        ),
    )


def _grad_a(
    x: Tensor, ds: Tensor, a: Sequence[Tensor], da: Sequence[Tensor | None], dropout: Dropout
) -> None:
    """Every da_i that is asked, in one pass over x."""
    m, k = x.shape
    r = max(t.shape[0] for t in a)
    br = block_rank(r)
    config = thin_columns(m, k, planned_device(x.device), br, x.element_size())
    run(
        _packed_grad_a_kernel,
        (ceil(k / config.block), ceil(r / br)),
        8 if br > 32 and config.block == 64 else config.warps,
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
        DROPOUT=dropout.on,
        PRECISION=precision(x.dtype),
        BC=config.block,
        BM=config.step,
        BR=br,
        **numbered(
            [{"R": t.shape[0], "p_da": out} for t, out in zip(a, da, strict=True)],
            {"R": 0, "p_da": None},
        ),
    )
