"""Rank pages: the weights of many adapters of one layer, 16 ranks to a page.

An adapter of rank r owns ceil(r / 16) pages, anywhere in the pool, so traffic follows the real
rank, mixed ranks cost nothing, and loading one adapter never moves another (the paging is that of
Sheng et al., 2023, "S-LoRA", by ranks instead of rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.common.checks import FLOATS, check_device, check_dtype, check_shape
from lora_kernels.ops.common.kinds import check_kinds

PAGE = 16  # ranks
INTEGERS = (torch.int32,)
FACTORS = (torch.float32, torch.float64)  # the last on the reference alone


def pages_of(rank: int) -> int:
    """How many pages an adapter of this rank takes."""
    return -(-rank // PAGE)


class RankPages(NamedTuple):
    """The adapters of one projection. Ranks past an adapter's own, and pages that no slot names,
    are never read: they may hold anything.

    Attributes:
        a: [P, 16, K]; row j of page c of a slot is row 16 c + j of its A.
        b: [P, 16, N], rows of Bᵀ, in a's dtype.
        table: int32 [S, C], the pages of each slot; past its own any number.
        ranks: int32 [S], 0 to 16 C; 0: the slot has no adapter here.
        scales: fp32 [S].

    Examples:
        >>> a, b = zip(*((torch.randn(r, 64), torch.randn(32, r)) for r in (4, 20)))
        >>> pages = lk.functional.page_adapters(a, b, scales=[2.0, 0.5])
        >>> pages.a.shape, pages.b.shape  # rank 4 takes one page of 16, rank 20 two
        (torch.Size([3, 16, 64]), torch.Size([3, 16, 32]))
        >>> pages.ranks
        tensor([ 4, 20], dtype=torch.int32)
    """

    a: Tensor
    b: Tensor
    table: Tensor
    ranks: Tensor
    scales: Tensor

    @property
    def slots(self) -> int:
        return self.table.shape[0]

    @property
    def width(self) -> int:
        """The highest rank that a slot can hold."""
        return self.table.shape[1] * PAGE

    def check(self, name: str = "pages") -> RankPages:
        """Raise ValueError or TypeError that names what does not fit; returns the pages.

        Reads the table and the ranks: for set-up time, as the ops trust them on a GPU.
        """
        check_pages(name, self)
        self.check_values(name)
        return self

    def check_values(self, name: str = "pages") -> None:
        """Raise ValueError unless every page that a slot names is there."""
        ranks = self.ranks
        if bool(((ranks < 0) | (ranks > self.width)).any()):
            bad = int(((ranks < 0) | (ranks > self.width)).nonzero()[0])
            raise ValueError(
                f"{name}.ranks: got {int(ranks[bad])} at slot {bad}, expected 0 to {self.width}"
            )
        used = torch.arange(self.table.shape[1], device=ranks.device) * PAGE < ranks[:, None]
        wrong = used & ((self.table < 0) | (self.table >= self.a.shape[0]))
        if bool(wrong.any()):
            slot, at = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{name}.table: got page {int(self.table[slot, at])} at slot {slot}, expected "
                f"0 to {self.a.shape[0] - 1}"
            )


FIELDS = len(RankPages._fields)


def check_pages(
    name: str,
    pages: RankPages,
    k: int | str = "K",
    slots: int | str = "S",
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise ValueError or TypeError unless shapes, dtypes and devices fit; reads no values."""
    a, b, table, ranks, scales = pages
    device = device or a.device
    check_shape(f"{name}.a", a, ("P", PAGE, k))
    check_shape(f"{name}.b", b, (a.shape[0], PAGE, "N"))
    check_shape(f"{name}.table", table, (slots, "C"))
    check_shape(f"{name}.ranks", ranks, table.shape[:1])
    check_shape(f"{name}.scales", scales, table.shape[:1])
    for field, t, expected in (
        ("a", a, dtypes),
        ("b", b, (a.dtype,)),
        ("table", table, INTEGERS),
        ("ranks", ranks, INTEGERS),
        ("scales", scales, FACTORS),
    ):
        if t.dtype not in expected or t.device != device or not t.is_contiguous():
            check_dtype(f"{name}.{field}", t, expected)
            check_device(f"{name}.{field}", t, device)
            raise ValueError(f"{name}.{field}: has stride {list(t.stride())}, expected contiguous")


def split_pages(flat: Sequence[Tensor]) -> list[RankPages]:
    """The projections of an op's flat list."""
    return [RankPages(*flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)]


def page_adapters(
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scales: Sequence[float] | Tensor,
) -> RankPages:
    """Pages made of separate adapters, a slot each; gradients of the pages go on to the adapters.

    Args:
        lora_a, lora_b: A [r_i, K] and B [N, r_i] of each slot, one dtype; None: no adapter.
        scales: of each slot.

    Raises:
        ValueError: lists of different lengths, no adapter at all, or a shape that does not fit.

    Examples:
        >>> a, b = torch.randn(8, 64), torch.randn(32, 8)
        >>> pages = lk.functional.page_adapters([a, None], [b, None], scales=[2.0, 1.0])
        >>> pages.ranks  # slot 1 leaves this projection alone
        tensor([8, 0], dtype=torch.int32)
    """
    try:
        if not len(lora_a) == len(lora_b) == len(scales):
            raise ValueError(
                f"lora_b: got {len(lora_b)} adapters and {len(scales)} scales, expected "
                f"{len(lora_a)} as lora_a has"
            )
        first = next((a for a in lora_a if a is not None), None)
        if first is None:
            raise ValueError(f"lora_a: got {list(lora_a)}, expected at least one adapter")
        rows_a, rows_b, ranks = [], [], []
        table: list[list[int]] = []
        page = 0
        for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a is None or b is None:
                if a is not b:
                    raise ValueError(
                        f"lora_b[{i}]: got {b}, expected an adapter or None as lora_a[{i}]"
                    )
                table.append([])
                ranks.append(0)
                continue
            check_shape(f"lora_a[{i}]", a, ["r", first.shape[1]])
            check_shape(f"lora_b[{i}]", b, ["N", a.shape[0]])
            count = pages_of(a.shape[0])
            pad = (0, 0, 0, count * PAGE - a.shape[0])
            rows_a.append(torch.nn.functional.pad(a, pad))
            rows_b.append(torch.nn.functional.pad(b.T, pad))
            table.append(list(range(page, page + count)))
            ranks.append(a.shape[0])
            page += count
        columns = max(map(len, table))
        filled = [row + [0] * (columns - len(row)) for row in table]
        device = first.device
        return RankPages(
            torch.cat(rows_a).unflatten(0, (-1, PAGE)),
            torch.cat(rows_b).unflatten(0, (-1, PAGE)),
            torch.tensor(filled, dtype=torch.int32, device=device),
            torch.tensor(ranks, dtype=torch.int32, device=device),
            scales
            if isinstance(scales, Tensor)
            else torch.tensor(scales, dtype=torch.float32, device=device),
        )
    except Exception:
        check_kinds(page_adapters, locals())
        raise
