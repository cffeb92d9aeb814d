"""Schemas, checks and fakes of many adapters on an embedding. ids are 1-D here.

`pages` is one `RankPages` whose A is stored by token: a [P, V, 16], so that the 16 ranks of a token
lie side by side; b [P, 16, D] and the rest as ever. ids int32 or int64 [T], slots int32 [T].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.dispatch.schema import Mutated
from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.flops import product
from lora_kernels.ops.gather.pages import INTEGERS, PAGE, RankPages, check_pages

IDS = (torch.int64, torch.int32)


def check_embedding_pages(name: str, pages: RankPages) -> None:
    """`check_pages` of pages whose a is [P, V, 16]; reads no values."""
    check_shape(f"{name}.a", pages.a, ["P", "V", PAGE])
    if not pages.a.is_contiguous():
        raise ValueError(f"{name}.a: has stride {list(pages.a.stride())}, expected contiguous")
    # A width of 0: the other checks do not need V.
    check_pages(name, pages._replace(a=pages.a.new_empty(pages.a.shape[0], PAGE, 0)))


def _expand_flops(call: Any) -> int:
    """s·Bᵀ of every token with all ranks that a slot has room for; A's part is looked up."""
    _, b, table, *_ = call.pages
    return product(call.ids[0], b[2], table[1] * PAGE)


def _bwd_flops(call: Any) -> int:
    a, b, scales = call.needs
    return _expand_flops(call) * ((a or scales) + b)  # u = dy·B, dyᵀ·s


@define("gather_lora_embed_fwd", "Tensor y", flops=_expand_flops)
class GatherEmbedForward(NamedTuple):
    """y[t] = W[id_t] + the adapter's part of token t."""

    ids: Tensor
    weight: Tensor | None
    pages: Sequence[Tensor]
    slots: Tensor

    def check(self) -> None:
        """Raise ValueError or TypeError that names the argument which does not fit."""
        ids, weight, slots, p = self.ids, self.weight, self.slots, RankPages(*self.pages)
        check_embedding_pages("pages", p)
        device = p.a.device
        check_dtype("ids", ids, IDS)
        check_shape("ids", ids, ["T"])
        check_device("ids", ids, device)
        check_dtype("slots", slots, INTEGERS)
        check_shape("slots", slots, [ids.shape[0]])
        check_device("slots", slots, device)
        if weight is not None:
            check_dtype("weight", weight, FLOATS)
            check_shape("weight", weight, [p.a.shape[1], p.b.shape[2]])
            check_device("weight", weight, device)

    def fake(self) -> Tensor:
        like = self.pages[0] if self.weight is None else self.weight
        return like.new_empty((self.ids.shape[0], self.pages[1].shape[2]))


@define("gather_lora_embed_add", "()", flops=_expand_flops)
class GatherEmbedAdd(NamedTuple):
    """out += the adapters' part of y."""

    out: Mutated
    ids: Tensor
    pages: Sequence[Tensor]
    slots: Tensor

    def fake(self) -> None:
        return None


@define("gather_lora_embed_bwd", "(Tensor da, Tensor db, Tensor dscales)", flops=_bwd_flops)
class GatherEmbedBackward(NamedTuple):
    """da, db and dscales, in the order of `needs`; those not needed are empty."""

    dy: Tensor
    ids: Tensor
    pages: Sequence[Tensor]
    slots: Tensor
    needs: Sequence[bool]

    def fake(self) -> tuple[Tensor, Tensor, Tensor]:
        wanted = zip((self.pages[0], self.pages[1], self.pages[4]), self.needs, strict=True)
        da, db, dscales = (t.new_empty(t.shape if want else (0,)) for t, want in wanted)
        return da, db, dscales
