"""PageStore: the rank pages of every module of a pool, and which of them are free."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels.ops.gather import PAGE, RankPages, pages_of
from lora_kernels.serving.spec import PoolSpec
from lora_kernels.serving.state import AdapterState

PageCounts = list[int]  # pages at each module, in the spec's order
PageNumbers = list[list[int]]  # which pages


class PageStore:
    """The pages of all modules. It hands out page numbers and writes adapters to pages; the
    `SlotAllocator` decides which adapter has which pages, and when a write is safe.

    A page that no slot refers to is never read, so only ranks are cleared. Tables hold valid page
    numbers at all times, for a kernel may read them meanwhile.

    Attributes:
        modules: `RankPages` by name; all tables are parts of one tensor (ranks, scales too), so
            that a slot is written in three copies, whatever the number of modules.
        free: free page numbers of each module, the next one last.
    """

    def __init__(self, spec: PoolSpec, slots: int, pages: int) -> None:
        self.spec, self.count = spec, pages
        m, device = len(spec.modules), spec.device
        self._pinned = device.type == "cuda"
        with torch.inference_mode(
            False
        ):  # tensors made in inference mode cannot be written outside it
            self.tables = torch.zeros(
                m, slots, spec.columns, dtype=torch.int32, device=device
            )  # [M, S, C]
            self.ranks = torch.zeros(m, slots, dtype=torch.int32, device=device)
            self.scales = torch.zeros(m, slots, dtype=torch.float32, device=device)
            self.modules = {
                name: RankPages(
                    torch.empty(
                        (pages, k, PAGE) if name in spec.embeddings else (pages, PAGE, k),
                        dtype=spec.dtype,
                        device=device,
                    ),
                    torch.empty(pages, PAGE, n, dtype=spec.dtype, device=device),
                    self.tables[i],
                    self.ranks[i],
                    self.scales[i],
                )
                for i, (name, (k, n)) in enumerate(spec.modules.items())
            }
        self.free = [list(range(pages))[::-1] for _ in range(m)]

    def counts(self, state: AdapterState) -> PageCounts:
        """The pages that an adapter takes at each module."""
        found = (state.factors.get(name) for name in self.spec.modules)
        return [0 if f is None else pages_of(f.a.shape[0]) for f in found]

    def allocate(self, counts: Sequence[int]) -> PageNumbers:
        """So many pages of each module; the caller has checked that they are free."""
        return [[free.pop() for _ in range(n)] for free, n in zip(self.free, counts, strict=True)]

    def release(self, numbers: PageNumbers) -> None:
        """Make pages free again; the first of them is the next to be allocated."""
        for free, pages in zip(self.free, numbers, strict=True):
            free += reversed(pages)

    @torch.no_grad()
    def write(self, slot: int, numbers: PageNumbers, state: AdapterState) -> None:
        """Fill a slot with an adapter."""
        tables, ranks, scales = [], [], []
        for (name, into), pages in zip(self.modules.items(), numbers, strict=True):
            f = state.factors.get(name)
            tables.append(pages + [0] * (self.spec.columns - len(pages)))
            ranks.append(0 if f is None else f.a.shape[0])
            scales.append(0.0 if f is None else f.scale)
            if f is None:
                continue
            a = into.a.transpose(1, 2) if name in self.spec.embeddings else into.a
            for c, page in enumerate(pages):
                for to, source in ((a, f.a), (into.b, f.b)):
                    rows = source[c * PAGE : (c + 1) * PAGE]
                    to[page, : rows.shape[0]].copy_(rows, non_blocking=True)
        # The ranks come last: with rank 0 a slot refers to no page.
        for column, values in ((self.tables, tables), (self.scales, scales), (self.ranks, ranks)):
            host = torch.tensor(values, dtype=column.dtype, pin_memory=self._pinned)
            column[:, slot].copy_(host, non_blocking=True)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Leave the slot without an adapter."""
        self.ranks[:, slot].zero_()

    @property
    def pages_free(self) -> int:
        return sum(map(len, self.free))

    @property
    def device_bytes(self) -> int:
        return self.spec.page_bytes * self.count + self.table_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use and of all tables."""
        size = self.spec.dtype.itemsize
        used = (
            (self.count - len(free)) * PAGE * (k + n) * size
            for free, (k, n) in zip(self.free, self.spec.modules.values(), strict=True)
        )
        return sum(used) + self.table_bytes

    @property
    def table_bytes(self) -> int:
        return self.tables.nbytes + self.ranks.nbytes + self.scales.nbytes
