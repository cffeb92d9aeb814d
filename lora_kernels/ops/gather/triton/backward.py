"""gather_lora_bwd by the Triton kernels; the derivation stands in `api.py`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels.ops.common.triton.base_product import base_product_t
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.gather.pages import RankPages, split_pages
from lora_kernels.ops.gather.schema import GatherLoRABackward
from lora_kernels.ops.gather.triton.arguments import Mask
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.expand import expand
from lora_kernels.ops.gather.triton.forward import chosen_plan
from lora_kernels.ops.gather.triton.shrink import shrink
from lora_kernels.ops.gather.triton.wgrad import (
    grad,
    scale_sums,
)


def gather_lora_bwd(
    c: GatherLoRABackward,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """dx, dbias, dweights, and da, db and dscales of each projection; those not needed are empty.

    A page that no entry of this batch uses gets zeros."""
    dy, x, s, projections, want = c.dy, c.x, c.s, split_pages(c.pages), c.want
    given = Entries(c.entries, x.shape[0], projections[0].slots)
    dx = x.new_empty(0)
    if want.x and c.base:
        dx = base_product_t(dy, Weight(c.base, c.meta)).contiguous()
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
