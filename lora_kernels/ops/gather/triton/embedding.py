"""gather_lora_embed_fwd, gather_lora_embed_add and gather_lora_embed_bwd by the Triton kernels:
what is read by token, then the passes of the linear op. The derivation stands in
`../embedding.py`."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.triton_host import run, stride
from lora_kernels.ops.gather.embedding_schema import (
    GatherEmbedAdd,
    GatherEmbedBackward,
    GatherEmbedForward,
)
from lora_kernels.ops.gather.pages import PAGE, RankPages
from lora_kernels.ops.gather.triton.backward import grad, grad_sums, scale_sums
from lora_kernels.ops.gather.triton.embed import (
    _gather_embed_grad_kernel,
    _gather_embed_read_kernel,
)
from lora_kernels.ops.gather.triton.forward import chosen_plan
from lora_kernels.ops.gather.triton.passes import expand
from lora_kernels.ops.gather.triton.work import Entries

_BLOCK_N = 1024
_RUN = 32  # tokens of a run that are added together


def gather_lora_embed_fwd(c: GatherEmbedForward) -> Tensor:
    """y [T, N]; a token whose id is not there gets zeros."""
    weight, p = c.weight, RankPages(*c.pages)
    like = p.a if weight is None else weight
    y = like.new_empty((c.ids.shape[0], p.b.shape[2]))
    s, entries = _read(c.ids, p, c.slots, weight, None if weight is None else y)
    _add(y, s, p, entries, overwrite=weight is None)
    return y


def gather_lora_embed_add(c: GatherEmbedAdd) -> None:
    """out += the adapters' part."""
    p = RankPages(*c.pages)
    s, entries = _read(c.ids, p, c.slots)
    _add(c.out, s, p, entries, overwrite=False)


def gather_lora_embed_bwd(c: GatherEmbedBackward) -> tuple[Tensor, Tensor, Tensor]:
    """da, db and dscales; those not needed are empty."""
    dy, p = c.dy, RankPages(*c.pages)
    want_a, want_b, want_scales = c.needs
    wanted = zip((p.a, p.b, p.scales), c.needs, strict=True)
    da, db, dscales = (t.new_zeros(t.shape if want else (0,)) for t, want in wanted)
    s, entries = _read(c.ids, p, c.slots)
    if entries.count == 0 or p.slots == 0:
        return da, db, dscales
    if want_b:
        grad(s, dy, db, p, entries, None)
    if want_a or want_scales:
        u = grad_sums(dy, PAGE, p, entries)
        if want_a:
            _grad_a(u, c.ids, da, p, entries)
        if want_scales:
            scale_sums((u * s).sum(1), dscales, entries)
    return da, db, dscales


def _read(
    ids: Tensor,
    p: RankPages,
    slots: Tensor,
    weight: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Entries]:
    """s [T, ranks] in fp32 and the entries of tokens whose id is there; y takes weight's rows."""
    tokens, n = ids.shape[0], p.b.shape[2]
    s = p.scales.new_empty((tokens, p.width))
    own = slots.new_empty(tokens)
    run(
        _gather_embed_read_kernel,
        (tokens, 1 if y is None else max(1, ceil(n / _BLOCK_N))),
        4,
        1,
        p_ids=ids.contiguous(),
        p_slots=slots.contiguous(),
        p_a=p.a,
        p_weight=weight,
        p_table=p.table,
        p_ranks=p.ranks,
        p_s=s,
        p_own=own,
        p_y=y,
        V=p.a.shape[1],
        N=n,
        S=p.slots,
        C=p.table.shape[1],
        stride_wv=stride(weight, 0),
        stride_wn=stride(weight, 1),
        stride_s=p.width,
        BN=_BLOCK_N,
    )
    return s, Entries([own], tokens, p.slots)


def _add(out: Tensor, s: Tensor, p: RankPages, entries: Entries, *, overwrite: bool) -> None:
    if entries.count == 0 or p.slots == 0:
        if overwrite:
            out.zero_()
        return
    plan = chosen_plan(out, out.shape[1], p, entries, None)
    expand(s, p.b, out, p, entries, plan, dtype=out.dtype, overwrite=overwrite)


def _grad_a(u: Tensor, ids: Tensor, da: Tensor, p: RankPages, entries: Entries) -> None:
    """da [P, V, 16] from u [T, ranks]: the tokens of a slot with one id beside each other."""
    vocabulary = p.a.shape[1]
    keys = entries.slots.long() * vocabulary + ids
    keys = keys.masked_fill(entries.slots < 0, -1)  # there ids may be anything
    keys, order = keys.sort(stable=True)
    first = torch.searchsorted(keys, keys, out_int32=True)
    end = torch.searchsorted(keys, keys, right=True, out_int32=True)
    run(
        _gather_embed_grad_kernel,
        (entries.count, p.table.shape[1]),
        1,
        1,
        p_u=u,
        p_ids=ids.contiguous(),
        p_slots=entries.slots,
        p_order=order.int(),
        p_first=first,
        p_end=end,
        p_out=da,
        p_table=p.table,
        p_ranks=p.ranks,
        p_scales=p.scales,
        V=vocabulary,
        C=p.table.shape[1],
        stride_u=u.stride(0),
        BLOCK=_RUN,
    )
