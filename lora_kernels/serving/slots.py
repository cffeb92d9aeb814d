"""SlotAllocator: which adapters are in which slots and pages, and which are evicted for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kernels.adapters.words import first_few
from lora_kernels.serving.errors import AdapterPoolFull
from lora_kernels.serving.pages import PageCounts, PageNumbers, PageStore
from lora_kernels.serving.spec import PoolSpec
from lora_kernels.serving.state import AdapterState
from lora_kernels.serving.transfer import Events, Transfer

_SHOWN = 12


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter in a slot.

    Attributes:
        pages: the numbers of its pages at each module.
        refs: how many routes hold it.
        pinned: it stays until it is unpinned.
        written: the event after its copies to the device; None once they are known to be done.
        readers: by stream, the last event after work that read it.
    """

    name: str
    slot: int
    pages: PageNumbers
    refs: int = 0
    pinned: bool = False
    written: Any = None
    readers: Events = field(default_factory=dict)

    @property
    def counts(self) -> PageCounts:
        return [len(pages) for pages in self.pages]

    @property
    def evictable(self) -> bool:
        return not self.refs and not self.pinned


class SlotAllocator:
    """The slots and pages of a pool. The caller holds the pool's lock.

    Attributes:
        store: the pages.
        transfer: copies to the device.
        loaded: adapters in a slot by name, least recently used first.
        evictions: how many adapters left their slot to make room.
    """

    def __init__(self, spec: PoolSpec, slots: int, pages: int) -> None:
        self.store = PageStore(spec, slots, pages)
        self.transfer = Transfer(spec.device)
        self.loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self.evictions = 0
        self._by_slot: list[LoadedAdapter | None] = [None] * slots
        self._free_slots = list(range(slots))[::-1]

    def load(self, states: Mapping[str, AdapterState], keep: Sequence[str] = ()) -> None:
        """Put adapters that are in no slot into one each.

        Args:
            keep: names of adapters that must not be evicted for them.

        Raises:
            AdapterPoolFull: there is no room for all of them; nothing has changed.
        """
        if not states:
            return
        counts = {name: self.store.counts(state) for name, state in states.items()}
        total = [sum(of) for of in zip(*counts.values(), strict=True)]
        self._make_room(list(states), total, len(states), keep)
        for name, state in states.items():
            pages = self.store.allocate(counts[name])
            adapter = LoadedAdapter(name, self._free_slots.pop(), pages)
            self.loaded[name] = self._by_slot[adapter.slot] = adapter
            try:
                self._write(adapter, state)
            except BaseException:
                self.evict(adapter)
                raise

    def overwrite(self, adapter: LoadedAdapter, state: AdapterState) -> None:
        """Put other weights in place of an adapter's; AdapterPoolFull leaves it as it was."""
        counts = self.store.counts(state)
        more = [max(0, n - had) for n, had in zip(counts, adapter.counts, strict=True)]
        self._make_room([adapter.name], more, 0, [adapter.name])
        extra = self.store.allocate(more)
        pages = [own + new for own, new in zip(adapter.pages, extra, strict=True)]
        adapter.pages = [p[:n] for p, n in zip(pages, counts, strict=True)]
        self.transfer.after(adapter.readers.values())
        try:
            self._write(adapter, state)
        except BaseException:  # half of it is old and half is new
            self.evict(adapter)
            raise
        finally:
            self.store.release([p[n:] for p, n in zip(pages, counts, strict=True)])

    def evict(self, adapter: LoadedAdapter) -> None:
        """Take an adapter out of its slot. Later writes to its pages wait for its readers."""
        self.transfer.after(adapter.readers.values())
        with self.transfer.copying():
            self.store.clear(adapter.slot)
        self.store.release(adapter.pages)
        self._free_slots.append(adapter.slot)
        self._by_slot[adapter.slot] = None
        del self.loaded[adapter.name]

    def hold(self, name: str) -> LoadedAdapter:
        """Count one more route for an adapter, which is now the most recently used. The current
        stream waits for its weights."""
        adapter = self.loaded[name]
        adapter.refs += 1
        self.loaded.move_to_end(name)
        if self.transfer.wait(adapter.written):
            adapter.written = None
        return adapter

    def release(self, held: Sequence[LoadedAdapter], events: Events) -> None:
        """Count one route less for each adapter; `events` are after the routes' work."""
        for adapter in held:
            adapter.refs -= 1
            adapter.readers.update(events)

    def names_in(self, slots: Sequence[int]) -> list[str]:
        """The adapters in these slots; ValueError for a slot without one."""
        names: list[str] = []
        for slot in slots:
            found = self._by_slot[slot] if 0 <= slot < len(self._by_slot) else None
            if found is None:
                raise ValueError(f"slots: got {slot}, expected -1 or the slot of a loaded adapter")
            names.append(found.name)
        return names

    def _write(self, adapter: LoadedAdapter, state: AdapterState) -> None:
        with self.transfer.copying():
            self.store.write(adapter.slot, adapter.pages, state)
        adapter.written = self.transfer.written()

    def _make_room(
        self, names: Sequence[str], counts: PageCounts, slots: int, keep: Sequence[str]
    ) -> None:
        """Evict the least recently used adapters that help, until so much is free.

        Args:
            names: adapters that need the room, for the error.
            counts, slots: how many pages of each module, and how many slots, they need.
            keep: adapters that must stay.
        """
        short = [n - len(free) for n, free in zip(counts, self.store.free, strict=True)]
        slots -= len(self._free_slots)
        evicted: list[LoadedAdapter] = []
        for adapter in self.loaded.values():
            if slots <= 0 and max(short) <= 0:
                break
            if not adapter.evictable or adapter.name in keep:
                continue
            own = adapter.counts
            if slots > 0 or any(s > 0 and n for s, n in zip(short, own, strict=True)):
                evicted.append(adapter)
                short = [s - n for s, n in zip(short, own, strict=True)]
                slots -= 1
        if slots > 0 or max(short) > 0:
            raise self._full(names, counts, slots, short)
        for adapter in evicted:
            self.evict(adapter)
        self.evictions += len(evicted)

    def _full(
        self, names: Sequence[str], counts: PageCounts, slots: int, short: PageCounts
    ) -> AdapterPoolFull:
        pinned = [a.name for a in self.loaded.values() if a.pinned]
        in_use = [a.name for a in self.loaded.values() if a.refs]
        if slots > 0:
            lack = f"{slots} more slots than the {len(self._by_slot)} of the pool can give"
        else:
            worst = max(range(len(short)), key=short.__getitem__)
            lack = (
                f"{counts[worst]} pages at {list(self.store.spec.modules)[worst]}, {short[worst]} "
                f"more than its {self.store.count} can give"
            )
        return AdapterPoolFull(
            f"no room for {first_few(names, _SHOWN)}: needs {lack}; pinned: "
            f"{first_few(pinned, _SHOWN)}; in use: {first_few(in_use, _SHOWN)}",
            pinned,
            in_use,
        )
