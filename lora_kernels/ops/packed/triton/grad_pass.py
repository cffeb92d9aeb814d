"""One read of every dy_i for both of its thin products, ds_i and dB_i, and for dbias_i."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import span_of
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.strategies import block_rank, one_read_parts
from lora_kernels.ops.common.thin.grad_pass import ones_rows
from lora_kernels.ops.common.thin.sums import _SUM_BLOCK
from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.packed.triton.groups import ends, numbered
from lora_kernels.ops.packed.triton.kernels import _packed_grad_pass_kernel, _packed_sum_kernel


def packed_grad_pass(
    dy: Sequence[Tensor],
    s: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    ds: Sequence[Tensor] | None,
    db: Sequence[Tensor] | None,
    dbias: Sequence[Tensor] | None,
) -> None:
    """ds_i = scale_i · dy_i·b_i, db_i = scale_i · dy_iᵀ·s_i and dbias_i, where given: two launches.

    ds_i, db_i and dbias_i are contiguous; the columns of s_i are neighbours in memory.
    """
    m, size = dy[0].shape[0], dy[0].element_size()
    widths, ranks = [t.shape[1] for t in dy], [t.shape[1] for t in b]
    br = block_rank(max(ranks))
    bn = 256 if size == 2 and br <= 32 else 64 if size == 4 else 128
    bm = 64 if size == 2 else 16
    end = ends(widths, bn)
    device = planned_device(dy[0].device)
    _, spans = one_read_parts(max(m, 1), max(1, end[-1] * bn), device, bn)
    span = span_of(max(m, 1), spans, bm)
    spans = ceil(max(m, 1) / span)
    parts: list[dict[str, Tensor | None]] = [
        {
            "p_ds": None if ds is None else t.new_empty((ceil(n / bn), m, r), dtype=torch.float32),
            "p_db": None if db is None else t.new_empty((spans, n, r), dtype=torch.float32),
            "p_dbias": None if dbias is None else t.new_empty((spans, n), dtype=torch.float32),
        }
        for t, n, r in zip(dy, widths, ranks, strict=True)
    ]
    run(
        _packed_grad_pass_kernel,
        (end[-1], spans, ceil(max(ranks) / br)),
        8 if size == 2 else 4,
        2,
        whole_registers=dy[0].dtype == torch.float16,  # see `outer`
        M=m,
        span=span,
        end_0=end[0],
        end_1=end[1],
        end_2=end[2],
        EVEN_N=all(n % bn == 0 for n in widths),
        PRECISION=precision(dy[0].dtype),
        BM=bm,
        BN=bn,
        BR=br,
        ONES=ones_rows(device, br),
        **numbered(
            [
                {
                    "p_dy": t,
                    "p_s": s[i],
                    "p_b": b[i],
                    "N": widths[i],
                    "R": ranks[i],
                    "stride_dym": t.stride(0),
                    "stride_dyn": t.stride(1),
                    "stride_sm": s[i].stride(0),
                    "stride_bn": b[i].stride(0),
                    "stride_br": b[i].stride(1),
                    **parts[i],
                }
                for i, t in enumerate(dy)
            ]
        ),
    )
    sums: list[dict[str, object]] = [
        {
            **parts[i],
            "p_ds_out": None if ds is None else ds[i],
            "ds_size": m * ranks[i],
            "ds_parts": ceil(n / bn),
            "scale": float(scales[i]),
            "p_db_out": None if db is None else db[i],
            "db_size": n * ranks[i],
            "p_dbias_out": None if dbias is None else dbias[i],
            "dbias_size": n,
        }
        for i, n in enumerate(widths)
    ]
    longest = max(m if ds is not None else 0, max(widths) if db is not None else 0)
    run(
        _packed_sum_kernel,
        (ceil(longest * max(ranks) / _SUM_BLOCK), len(dy), 3),
        4,
        2,
        spans=spans,
        BLOCK=_SUM_BLOCK,
        **numbered(sums),
    )
