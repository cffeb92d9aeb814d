"""The two launches of a projection: the sums s, and what they add."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages
from lora_kernels.ops.gather.triton.expand import (
    _gather_expand_chunk_kernel,
    _gather_expand_kernel,
)
from lora_kernels.ops.gather.triton.plan import Plan
from lora_kernels.ops.gather.triton.shrink import _gather_shrink_kernel
from lora_kernels.ops.gather.triton.work import Entries


class Mask:
    """The dropout of each slot, for one projection."""

    def __init__(self, dropout: Sequence[Tensor], stream: int) -> None:
        self.seeds, self.thresholds, self.rows = dropout
        self.stream = stream


def mask_args(mask: Mask | None) -> dict[str, Any]:
    if mask is None:
        return {"p_seeds": None, "p_thresholds": None, "p_rows": None, "stream": 0}
    return {
        "p_seeds": mask.seeds,
        "p_thresholds": mask.thresholds,
        "p_rows": mask.rows,
        "stream": mask.stream,
    }


def layout(s: Tensor) -> dict[str, Any]:
    """Of s [E, ..] or its parts [spans, E, ..], whose last stride is 1."""
    return {"size": s.stride(0) if s.dim() == 3 else 0, "stride_s": s.stride(-2)}


def shrink(
    x: Tensor,
    a: Tensor,
    s: Tensor,
    p: RankPages,
    entries: Entries,
    mask: Mask | None,
    plan: Plan,
    half: bool = False,
) -> None:
    """s [E, ..] in its type, or fp32 parts [spans, E, ..] where the plan splits K; with `half` s
    keeps what fp16 activations do."""
    k = x.shape[1]
    chunks = entries.chunks(plan.block_m) if plan.chunked else None
    shares = min(plan.page_programs, p.table.shape[1])
    programs = entries.count if chunks is None else entries.programs(plan.block_m, shares)
    run(
        _gather_shrink_kernel,
        (programs, plan.spans if plan.split else 1, shares),
        plan.shrink_warps,
        plan.stages,
        whole_registers=True,
        p_x=x,
        p_a=a,
        p_s=s,
        p_slots=entries.slots,
        p_tokens=entries.tokens,
        p_table=p.table,
        p_ranks=p.ranks,
        p_order=None if chunks is None else chunks.order,
        p_work=None if chunks is None else chunks.work,
        T=entries.tokens_count,
        K=k,
        S=entries.slots_count,
        C=p.table.shape[1],
        count_all=programs if chunks is None else chunks.work.shape[0],
        span=plan.span,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        SPLIT=plan.split,
        HALF=half,
        PRECISION=precision(x.dtype),
        BM=16 if chunks is None else plan.block_m,
        BK=plan.block_k,
        ONE_STEP=plan.split and plan.span == plan.block_k,
        **layout(s),
        **mask_args(mask),
    )


def expand(
    s: Tensor,
    b: Tensor,
    out: Tensor,
    p: RankPages,
    entries: Entries,
    plan: Plan,
    *,
    dtype: torch.dtype,
    keep: Tensor | None = None,
    late: Mask | None = None,
    mask: Mask | None = None,
    overwrite: bool,
) -> None:
    """out [T, N] += what each entry adds, or = it.

    Args:
        s: [E, ..], or fp32 parts [spans, E, ..].
        dtype: of the products.
        keep: takes the sums of the parts, [E, ..].
        late: the mask of x, whose factor the parts still lack.
        mask: of what is added.
    """
    n = b.shape[2]
    shared = {
        "p_s": s,
        "p_b": b,
        "p_out": out,
        "p_table": p.table,
        "p_ranks": p.ranks,
        "p_scales": p.scales,
        "N": n,
        "S": entries.slots_count,
        "C": p.table.shape[1],
        "stride_om": out.stride(0),
        "OVERWRITE": overwrite,
        "MASK_OUT": mask is not None,
        "PRECISION": precision(dtype),
        "DTYPE": _triton_type(dtype),
        **mask_args(mask or late),
    }
    if plan.chunked and entries.tokens is None:
        chunks = entries.chunks(plan.block_m)
        across = ceil(n / (plan.chunk_n * plan.blocks))
        run(
            _gather_expand_chunk_kernel,
            (entries.programs(plan.block_m, across), across),
            plan.chunk_warps,
            plan.stages,
            p_order=chunks.order,
            p_work=chunks.work,
            chunks=chunks.work.shape[0],
            ONE_PAGE=p.table.shape[1] == 1,
            BLOCKS=plan.blocks,
            BM=plan.block_m,
            BN=plan.chunk_n,
            stride_s=s.stride(-2),
            **shared,
        )
        return
    mixed = entries.tokens is not None
    run(
        _gather_expand_kernel,
        (entries.tokens_count, ceil(n / plan.block_n)),
        plan.expand_warps,
        plan.stages,
        p_keep=keep,
        p_slots=entries.slots,
        p_weights=entries.weights,
        p_order=entries.by_token[0] if mixed else None,
        p_edges=entries.by_token[1] if mixed else None,
        stride_keep=0 if keep is None else keep.stride(0),
        MASK_S=late is not None,
        PARTS=s.shape[0] if s.dim() == 3 else 1,
        BN=plan.block_n,
        **layout(s),
        **shared,
    )


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
