"""Schemas, checks and fakes of the multi-adapter ops. x and dy are 2-D here; `api.py` flattens.

An entry e adds one adapter to one token: entries = [slots] (entry e is token e) or
[slots, tokens, weights]; slots int32 [E], −1 for none, tokens int32 [E], weights fp32 [E].
`pages` holds `RankPages` of P projections side by side, whose outputs lie side by side in y.
dropout = [] or [seeds int64 [S], thresholds int32 [S], rows int32 [E]]: slot i has its own seed and
probability; entry e takes row rows[e] of the slot's mask, and projection p takes stream p. base and
meta are those of `common.base`, or [] and [N, K] for no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import define
from lora_kernels.dispatch.schema import Mutated
from lora_kernels.ops.common.base import check_base, check_input
from lora_kernels.ops.common.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_optional_vector,
    check_shape,
)
from lora_kernels.ops.common.flops import product
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.gather.pages import (
    FACTORS,
    FIELDS,
    INTEGERS,
    PAGE,
    RankPages,
    check_pages,
    split_pages,
)


class Needs(NamedTuple):
    """Which gradients gather_lora_bwd computes; of the projections a list each."""

    x: bool
    bias: bool
    weights: bool
    a: list[bool]
    b: list[bool]
    scales: list[bool]

    def pack(self) -> list[bool]:
        return [self.x, self.bias, self.weights, *self.a, *self.b, *self.scales]


def unpack_needs(needs: Sequence[bool], projections: int) -> Needs:
    a, b, scales = (list(needs[3 + i * projections :][:projections]) for i in range(3))
    return Needs(needs[0], needs[1], needs[2], a, b, scales)


def check_entries(entries: Sequence[Tensor], x: Tensor) -> None:
    """Raise ValueError or TypeError unless slots, tokens and weights go with x; reads no values."""
    fields = (("slots", INTEGERS), ("tokens", INTEGERS), ("weights", FACTORS))
    count = entries[0].shape[0] if len(entries) > 1 else x.shape[:-1].numel()
    for (name, dtypes), t in zip(fields, entries, strict=False):
        check_dtype(name, t, dtypes)
        check_shape(name, t, [count])
        check_device(name, t, x.device)


def check_dropout(
    dropout: Sequence[Tensor], slots: int, entries: int, device: torch.device
) -> None:
    """Raise ValueError or TypeError unless the dropout's tensors fit; reads no values."""
    fields = (("seeds", torch.int64, slots), ("thresholds", torch.int32, slots))
    for (name, dtype, size), t in zip(
        (*fields, ("rows", torch.int32, entries)), dropout, strict=False
    ):
        check_dtype(f"dropout.{name}", t, [dtype])
        check_shape(f"dropout.{name}", t, [size])
        check_device(f"dropout.{name}", t, device)


def check_projections(pages: Sequence[RankPages], n: int, k: int, x: Tensor) -> None:
    """Raise ValueError or TypeError unless the pages go with x [.., k] and y [.., n]."""
    if not pages:
        raise ValueError("pages: got none, expected those of one projection or more")
    slots: int | str = "S"
    dtypes: Sequence[torch.dtype] = FLOATS
    for i, p in enumerate(pages):
        check_pages(f"pages[{i}]", p, k, slots, dtypes, x.device)
        slots, dtypes = p.table.shape[0], (p.a.dtype,)
    total = sum(p.b.shape[2] for p in pages)
    if total != n:
        raise ValueError(f"pages: give {total} outputs, expected {n} as the base has")


def sums_width(pages: Sequence[Tensor]) -> int:
    """Columns of s: for each projection the highest rank that its slots can hold."""
    return sum(p.width for p in split_pages(pages))


def rank_products(pages: Sequence[Sequence[int]], entries: int) -> list[tuple[int, int]]:
    """FLOPs of x·Aᵀ and of s·Bᵀ for each projection. Every entry counts with the highest rank that
    a slot can hold, as in a batched product of gathered weights: shapes do not tell the real
    ranks."""
    found = []
    for at in range(0, len(pages), FIELDS):
        a, b, table, *_ = pages[at : at + FIELDS]
        width = table[1] * PAGE
        found.append((product(entries, width, a[2]), product(entries, width, b[2])))
    return found


def _base_flops(call: Any) -> int:
    return product(call.x[0], *call.meta[:2]) if call.base else 0


def _add_flops(call: Any) -> int:
    return sum(map(sum, rank_products(call.pages, call.entries[0][0])))


def _fwd_flops(call: Any) -> int:
    return _base_flops(call) + _add_flops(call)


def _bwd_flops(call: Any) -> int:
    products = rank_products(call.pages, call.entries[0][0])
    want = unpack_needs(call.needs, len(products))
    total = _base_flops(call) if want.x else 0
    for (by_a, by_b), a, b, scales in zip(products, want.a, want.b, want.scales, strict=True):
        total += by_b * (want.x or a or scales or want.weights)  # u = dy·B
        total += by_a * (want.x + a) + by_b * b
    return total


@define("gather_lora_fwd", "(Tensor y, Tensor s)", flops=_fwd_flops)
class GatherLoRAForward(NamedTuple):
    """y = x·Wᵀ + bias + the adapters' part; s [E, ranks] = drop(x[t])·A[slot]ᵀ."""

    x: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    bias: Tensor | None
    pages: Sequence[Tensor]
    entries: Sequence[Tensor]
    dropout: Sequence[Tensor]

    def check(self, x: Tensor) -> None:
        """Raise ValueError or TypeError that names the argument which does not fit.

        Args:
            x: as the user gave it, whose rows this call has.
        """
        check_input(x, self.meta[1])
        if self.base:
            check_base(x, self.base, self.meta)
        check_optional_vector("bias", self.bias, self.meta[0], x, [x.dtype])
        projections = split_pages(self.pages)
        check_projections(projections, self.meta[0], self.meta[1], x)
        check_entries(self.entries, x)
        count = self.entries[0].shape[0]
        check_dropout(self.dropout, projections[0].slots, count, x.device)

    def fake(self) -> tuple[Tensor, Tensor]:
        x = self.x
        size = (self.entries[0].shape[0], sums_width(self.pages))
        s = x.new_empty(size, dtype=rank_dtype(x.dtype))
        return x.new_empty((x.shape[0], self.meta[0])), s


@define("gather_lora_add", "()", flops=_add_flops)
class GatherLoRAAdd(NamedTuple):
    """out += the adapters' part of y, or out = it."""

    out: Mutated
    x: Tensor
    pages: Sequence[Tensor]
    entries: Sequence[Tensor]
    overwrite: bool

    def fake(self) -> None:
        return None


@define(
    "gather_lora_bwd",
    "(Tensor dx, Tensor dbias, Tensor dweights, Tensor[] da, Tensor[] db, Tensor[] dscales)",
    flops=_bwd_flops,
)
class GatherLoRABackward(NamedTuple):
    """The gradients that `needs` (packed, see `Needs`) asks for; the others are empty."""

    dy: Tensor
    x: Tensor
    s: Tensor
    base: Sequence[Tensor]
    meta: Sequence[int]
    pages: Sequence[Tensor]
    entries: Sequence[Tensor]
    dropout: Sequence[Tensor]
    needs: Sequence[bool]

    @property
    def want(self) -> Needs:
        """`needs` by name."""
        return unpack_needs(self.needs, len(self.pages) // FIELDS)

    def fake(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        want, projections = self.want, split_pages(self.pages)

        def like(t: Tensor, wanted: bool) -> Tensor:
            return t.new_empty(t.shape if wanted else (0,))

        weights = self.entries[0].shape if want.weights else (0,)
        return (
            like(self.x, want.x),
            self.x.new_empty((self.meta[0],) if want.bias else (0,)),
            projections[0].scales.new_empty(weights),
            [like(p.a, w) for p, w in zip(projections, want.a, strict=True)],
            [like(p.b, w) for p, w in zip(projections, want.b, strict=True)],
            [like(p.scales, w) for p, w in zip(projections, want.scales, strict=True)],
        )
