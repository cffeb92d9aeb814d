"""gather_lora_bwd by the Triton kernels; the derivation stands in `api.py`."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.triton_host import precision, run
from lora_kernels.ops.gather.pages import RankPages, split_pages
from lora_kernels.ops.gather.schema import GatherLoRABackward
from lora_kernels.ops.gather.triton.forward import chosen_plan
from lora_kernels.ops.gather.triton.grads import _gather_grad_kernel, _gather_scale_grad_kernel
from lora_kernels.ops.gather.triton.passes import Mask, expand, mask_args, shrink
from lora_kernels.ops.gather.triton.work import Entries
from lora_kernels.ops.nf4.schema import NF4LinearBackward
from lora_kernels.ops.nf4.triton.linear import nf4_linear_bwd

# Entries of a slot that a program looks at together, where only their order counts.
_GROUP = 64
_SUM_BLOCK = 256


def gather_lora_bwd(
    c: GatherLoRABackward,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, dbias, dweights, and da, db and dscales of each projection; those not needed are empty.

    A page that no entry of this batch uses gets zeros."""
    dy, x, s, projections, want = c.dy, c.x, c.s, split_pages(c.pages), c.want
    given = Entries(c.entries, x.shape[0], projections[0].slots)
    dx = x.new_empty(0)
    if want.x and c.base:
        dx = nf4_linear_bwd(NF4LinearBackward(dy, c.base, c.meta)).contiguous()
    elif want.x:
        dx = x.new_zeros(x.shape)
    dbias = dy.sum(0) if want.bias else x.new_empty(0)
    dweights = projections[0].scales.new_zeros(given.count if want.weights else 0)
    da, db, dscales = (
        [t.new_zeros(t.shape if w else (0,)) for t, w in zip(tensors, wanted, strict=True)]
        for tensors, wanted in (
            ([p.a for p in projections], want.a),
            ([p.b for p in projections], want.b),
            ([p.scales for p in projections], want.scales),
        )
    )
    n = r = 0
    for i, p in enumerate(projections):
        columns, ranks = slice(n, n + p.b.shape[2]), slice(r, r + p.width)
        n, r = columns.stop, ranks.stop
        if given.count == 0 or given.slots_count == 0:
            continue
        own, part = s[:, ranks], dy[:, columns]
        mask = Mask(c.dropout, i) if c.dropout else None
        if want.b[i]:
            grad(own, part, db[i], p, given, None)
        if not (want.x or want.a[i] or want.scales[i] or want.weights):
            continue
        u = grad_sums(part, p.a.shape[2], p, given)
        if want.a[i]:
            grad(u, x, da[i], p, given, mask)
        if want.x:
            plan = chosen_plan(part, p.a.shape[2], p, given, mask)
            expand(u, p.a, dx, p, given, plan, dtype=x.dtype, mask=mask, overwrite=False)
        if want.scales[i] or want.weights:
            product = (u * own).sum(1)
            if want.scales[i]:
                scale_sums(product, dscales[i], given)
            if want.weights:
                there = given.slots.clamp(0, given.slots_count - 1).long()
                dweights += p.scales.index_select(0, there) * product
    return dx, dbias, dweights, da, db, dscales


def grad_sums(dy: Tensor, n: int, p: RankPages, entries: Entries) -> Tensor:
    """u [E, ranks] = dy·B in fp32, zeros where there is no rank; n columns come of it."""
    u = dy.new_zeros((entries.count, p.width), dtype=torch.float32)
    plan = replace(chosen_plan(dy, n, p, entries, None), split=False)
    shrink(dy, p.b, u, p, entries, None, plan)
    return u


def grad(
    t: Tensor, x: Tensor, out: Tensor, p: RankPages, entries: Entries, mask: Mask | None
) -> None:
    """The gradient of a or b: out [P, 16, K] from t [E, ranks] and x [T, K]."""
    k, wide = x.shape[1], x.dtype == torch.float32
    step, block = (32, 64) if wide else (64, 128)
    by_slot = entries.chunks(_GROUP)
    run(
        _gather_grad_kernel,
        (p.slots, p.table.shape[1], ceil(k / block)),
        4,
        2,
        p_t=t,
        p_x=x,
        p_out=out,
        p_tokens=entries.tokens,
        p_weights=entries.weights,
        p_table=p.table,
        p_ranks=p.ranks,
        p_scales=p.scales,
        p_order=by_slot.order,
        p_edges=by_slot.edges,
        K=k,
        C=p.table.shape[1],
        stride_t=t.stride(0),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        PRECISION=precision(x.dtype),
        BM=step,
        BK=block,
        **mask_args(mask),
    )


def scale_sums(product: Tensor, out: Tensor, entries: Entries) -> None:
    by_slot = entries.chunks(_GROUP)
    run(
        _gather_scale_grad_kernel,
        (entries.slots_count,),
        4,
        1,
        p_product=product,
        p_weights=entries.weights,
        p_out=out,
        p_order=by_slot.order,
        p_edges=by_slot.edges,
        BLOCK=_SUM_BLOCK,
    )
