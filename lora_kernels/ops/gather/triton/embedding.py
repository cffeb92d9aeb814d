"""gather_lora_embed_fwd, gather_lora_embed_add and gather_lora_embed_bwd by the Triton kernels:
what is read by token, then the passes of the linear op. The derivation stands in
`../embedding.py`."""

from __future__ import annotations

from torch import Tensor

from lora_kernels.ops.gather.embedding_schema import (
    GatherEmbedAdd,
    GatherEmbedBackward,
    GatherEmbedForward,
)
from lora_kernels.ops.gather.pages import PAGE, RankPages
from lora_kernels.ops.gather.triton.backward import grad_sums
from lora_kernels.ops.gather.triton.embed import (
    grad_a,
    read,
)
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.expand import expand
from lora_kernels.ops.gather.triton.forward import chosen_plan
from lora_kernels.ops.gather.triton.wgrad import grad, scale_sums


def gather_lora_embed_fwd(c: GatherEmbedForward) -> Tensor:
    """y [T, N]; a token whose id is not there gets zeros."""
    weight, p = c.weight, RankPages(*c.pages)
    like = p.a if weight is None else weight
    y = like.new_empty((c.ids.shape[0], p.b.shape[2]))
    s, entries = read(c.ids, p, c.slots, weight, None if weight is None else y)
    _add(y, s, p, entries, overwrite=weight is None)
    return y


def gather_lora_embed_add(c: GatherEmbedAdd) -> None:
    """out += the adapters' part."""
    p = RankPages(*c.pages)
    s, entries = read(c.ids, p, c.slots)
    _add(c.out, s, p, entries, overwrite=False)


def gather_lora_embed_bwd(c: GatherEmbedBackward) -> tuple[Tensor, Tensor, Tensor]:
    """da, db and dscales; those not needed are empty."""
    dy, p = c.dy, RankPages(*c.pages)
    want_a, want_b, want_scales = c.needs
    wanted = zip((p.a, p.b, p.scales), c.needs, strict=True)
    da, db, dscales = (t.new_zeros(t.shape if want else (0,)) for t, want in wanted)
    s, entries = read(c.ids, p, c.slots)
    if entries.count == 0 or p.slots == 0:
        return da, db, dscales
    if want_b:
        grad(s, dy, db, p, entries, None)
    if want_a or want_scales:
        u = grad_sums(dy, PAGE, p, entries)
        if want_a:
            grad_a(u, c.ids, da, p, entries)
        if want_scales:
            scale_sums((u * s).sum(1), dscales, entries)
    return da, db, dscales


def _add(out: Tensor, s: Tensor, p: RankPages, entries: Entries, *, overwrite: bool) -> None:
    if entries.count == 0 or p.slots == 0:
        if overwrite:
            out.zero_()
        return
    plan = chosen_plan(out, out.shape[1], p, entries, None)
    expand(s, p.b, out, p, entries, plan, dtype=out.dtype, overwrite=overwrite)
