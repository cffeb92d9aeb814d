"""lora_packed_fwd by the Triton kernels: x is read once for every three projections."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, thin_rows
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.strategies import block_rank
from lora_kernels.ops.common.triton_host import (
    Dropout,
    descriptor,
    precision,
    run,
    stride,
)
from lora_kernels.ops.lora.triton.forward import lora_linear_fwd
from lora_kernels.ops.nf4.triton.base import Weight
from lora_kernels.ops.packed.schema import LoRAPackedForward, rank_slices
from lora_kernels.ops.packed.triton.gemm import _packed_forward_kernel
from lora_kernels.ops.packed.triton.groups import (
    ends,
    groups,
    numbered,
    split_weights,
    weight_args,
)
from lora_kernels.ops.packed.triton.plan import plan_config
from lora_kernels.ops.packed.triton.thin import _packed_shrink_kernel


def lora_packed_fwd(c: LoRAPackedForward) -> tuple[list[Tensor], Tensor]:
    """y_i [M, N_i] and s [M, Σ R_i]."""
    x, a, m = c.x, c.a, c.x.shape[0]
    weights = split_weights(c.base, c.meta)
    columns = list(rank_slices(a))
    s = x.new_empty((m, columns[-1].stop), dtype=rank_dtype(x.dtype))
    y = [x.new_empty(0)] * len(weights)
    for group in groups(weights):
        first = group.start
        dropout = Dropout(c.dropout_p, c.seed, first)
        part = slice(group.start, group.stop)
        own = s[:, columns[first].start : columns[group[-1]].stop]
        r = max(t.shape[0] for t in a[part])
        planned = plan_config("lora_linear_fwd", [x], weights[part], r, dropout.on)
        if planned is None:
            for i in group:
                one = c.one(i, weights[i].base, weights[i].meta)
                y[i], s[:, columns[i]] = lora_linear_fwd(one)
            continue
        strategy, config = planned
        y[part] = [x.new_empty((m, w.meta.n)) for w in weights[part]]
        single_pass = strategy == "single_pass" and all(t.numel() > 0 for t in y[part])
        if not single_pass:
            _shrink(x, a[part], own, dropout)
        _project(
            x, weights[part], y[part], own, a[part], c.b[part], c.bias[part], c.scales[part],
            dropout, config, single_pass,
        )  # fmt: skip
    return y, s


def _shrink(x: Tensor, a: Sequence[Tensor], s: Tensor, dropout: Dropout) -> None:
    """The s_i side by side, in one pass over x."""
    m, k = x.shape
    size = x.element_size()
    r = max(t.shape[0] for t in a)
    br = block_rank(r)
    config = thin_rows(m, k, planned_device(x.device), br, size)
    step = min(config.step, 64)  # three partners are in flight with x
    run(
        _packed_shrink_kernel,
        (ceil(m / config.block), ceil(r / br)),
        8 if br > 32 and config.block == 64 else config.warps,
        min(config.stages, 3),
        p_x=x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        DROPOUT=dropout.on,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=step,
        BR=br,
        **numbered(
            [
                {"p_q": t, "R": t.shape[0], "stride_qk": t.stride(1), "stride_qr": t.stride(0)}
                for t in a
            ],
            {"p_q": None, "R": 0, "stride_qk": 0, "stride_qr": 0},
        ),
    )


def _project(
    x: Tensor,
    weights: Sequence[Weight],
    y: Sequence[Tensor],
    s: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scales: Sequence[float],
    dropout: Dropout,
    config: GemmConfig,
    single_pass: bool,
) -> None:
    """Every y_i in one launch; s is made there where single_pass, and read otherwise."""
    m, k = x.shape
    device = planned_device(x.device)
    end = ends([t.shape[1] for t in y], config.block_n)
    tiles = ceil(m / config.block_m) * end[-1]
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    format_args, own_args = weight_args(weights, config, backward=False)
    some_bias = next((t for t in bias if t is not None), None)
    run(
        _packed_forward_kernel,
        (programs,),
        config.warps,
        config.stages,
        whole_registers=weights[0].quantised,
        x=descriptor(x, [config.block_m, config.block_k]) if config.tma else x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        end_0=end[0],
        end_1=end[1],
        end_2=end[2],
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        BIAS=some_bias is not None,
        TMA=config.tma,
        EVEN_K=k % config.block_k == 0,
        HOLD_X=device.tma and dropout.on and single_pass,
        PRECISION=precision(x.dtype),
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
                    "p_y": y[i],
                    "p_q": a[i],
                    "p_u": b[i],
                    "p_bias": some_bias if bias[i] is None else bias[i],
                    "N": w.meta.n,
                    "R": a[i].shape[0],
                    "biased": 0 if bias[i] is None else w.meta.n,
                    "scale": float(scales[i]),
                    "stride_qk": a[i].stride(1),
                    "stride_qr": a[i].stride(0),
                    "stride_ur": b[i].stride(1),
                    "stride_un": b[i].stride(0),
                    "stride_bias": stride(bias[i]),
                }
                for i, w in enumerate(weights)
            ]
        ),
    )
