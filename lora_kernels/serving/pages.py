"""PageStore: the rank pages of every module of a pool, and which of them are free."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels.ops.gather import PAGE, RankPages, pages_of
from lora_kernels.serving.form import PoolForm
from lora_kernels.serving.state import AdapterState

Counts = list[int]  # pages at each module, in the form's order
Owned = list[list[int]]  # which ones


class PageStore:
    """Pages of all modules. It hands out page numbers and writes where it is told to; who may
    have which, and when a write is safe, is its owner's business.

    What no slot names is never read, so nothing is cleared but ranks. Tables hold valid numbers
    at all times, whoever reads them meanwhile.

    Attributes:
        modules: `RankPages` by name; all tables are parts of one tensor (ranks, scales too), so
            that a slot is written in three copies, whatever the number of modules.
        free: free page numbers of each module, the next one last.
    """

    def __init__(self, form: PoolForm, slots: int, pages: int) -> None:
        self.form, self.count = form, pages
        m, device = len(form.modules), form.device
        self._pinned = device.type == "cuda"
        with torch.inference_mode(False):  # what inference mode makes cannot be written outside it
            self.tables = torch.zeros(
                m, slots, form.columns, dtype=torch.int32, device=device
            )  # [M, S, C]
            self.ranks = torch.zeros(m, slots, dtype=torch.int32, device=device)
            self.scales = torch.zeros(m, slots, dtype=torch.float32, device=device)
            self.modules = {
                name: RankPages(
                    torch.empty(
                        (pages, k, PAGE) if name in form.embeddings else (pages, PAGE, k),
                        dtype=form.dtype,
                        device=device,
                    ),
                    torch.empty(pages, PAGE, n, dtype=form.dtype, device=device),
                    self.tables[i],
                    self.ranks[i],
                    self.scales[i],
                )
                for i, (name, (k, n)) in enumerate(form.modules.items())
            }
        self.free = [list(range(pages))[::-1] for _ in range(m)]

    def counts(self, state: AdapterState) -> Counts:
        """The pages that an adapter takes at each module."""
        found = (state.factors.get(name) for name in self.form.modules)
        return [0 if f is None else pages_of(f.a.shape[0]) for f in found]

    def take(self, counts: Sequence[int]) -> Owned:
        """Pages of every module, which are known to be free."""
        return [[free.pop() for _ in range(n)] for free, n in zip(self.free, counts, strict=True)]

    def give(self, owned: Owned) -> None:
        """Free pages; the first of them is the next to be taken."""
        for free, pages in zip(self.free, owned, strict=True):
            free += reversed(pages)

    @torch.no_grad()
    def write(self, slot: int, owned: Owned, state: AdapterState) -> None:
        """Fill a slot with an adapter."""
        tables, ranks, scales = [], [], []
        for (name, into), pages in zip(self.modules.items(), owned, strict=True):
            f = state.factors.get(name)
            tables.append(pages + [0] * (self.form.columns - len(pages)))
            ranks.append(0 if f is None else f.a.shape[0])
            scales.append(0.0 if f is None else f.scale)
            if f is None:
                continue
            a = into.a.transpose(1, 2) if name in self.form.embeddings else into.a
            for c, page in enumerate(pages):
                for to, source in ((a, f.a), (into.b, f.b)):
                    rows = source[c * PAGE : (c + 1) * PAGE]
                    to[page, : rows.shape[0]].copy_(rows, non_blocking=True)
        # The ranks last: until then nobody finds the pages through the slot.
        for column, values in ((self.tables, tables), (self.scales, scales), (self.ranks, ranks)):
            host = torch.tensor(values, dtype=column.dtype, pin_memory=self._pinned)
            column[:, slot].copy_(host, non_blocking=True)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """The slot has no adapter any more."""
        self.ranks[:, slot].zero_()

    @property
    def pages_free(self) -> int:
        return sum(map(len, self.free))

    @property
    def device_bytes(self) -> int:
        return self.form.page_bytes * self.count + self.table_bytes

    @property
    def used_bytes(self) -> int:
        """Of the pages that somebody has, and of all tables."""
        size = self.form.dtype.itemsize
        used = (
            (self.count - len(free)) * PAGE * (k + n) * size
            for free, (k, n) in zip(self.free, self.form.modules.values(), strict=True)
        )
        return sum(used) + self.table_bytes

    @property
    def table_bytes(self) -> int:
        return self.tables.nbytes + self.ranks.nbytes + self.scales.nbytes
