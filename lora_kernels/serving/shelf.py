"""Shelf: which adapters are in which slot and pages, and who has to leave for another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kernels.serving.errors import AdapterPoolFull
from lora_kernels.serving.form import PoolForm
from lora_kernels.serving.pages import Counts, Owned, PageStore
from lora_kernels.serving.state import AdapterState
from lora_kernels.serving.transfer import Marks, Transfer

_SHOWN = 12


@dataclass(eq=False)
class Resident:
    """An adapter in a slot.

    Attributes:
        owned: its pages at each module.
        refs: routes that hold it.
        written: the event after its copies; None where they are known to be over.
        readers: the last event of each stream that a route let go of it on.
    """

    name: str
    slot: int
    owned: Owned
    refs: int = 0
    pinned: bool = False
    written: Any = None
    readers: Marks = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        return [len(pages) for pages in self.owned]

    @property
    def free_to_leave(self) -> bool:
        return not self.refs and not self.pinned


class Shelf:
    """The slots and pages of a pool. Whoever calls holds the pool's lock.

    Attributes:
        store: the pages.
        residents: by name, least recently used first.
        evictions: how many left to make room.
    """

    def __init__(self, form: PoolForm, slots: int, pages: int) -> None:
        self.store = PageStore(form, slots, pages)
        self.transfer = Transfer(form.device)
        self.residents: OrderedDict[str, Resident] = OrderedDict()
        self.evictions = 0
        self._by_slot: list[Resident | None] = [None] * slots
        self._free_slots = list(range(slots))[::-1]

    def bring(self, states: Mapping[str, AdapterState], stay: Sequence[str] = ()) -> None:
        """Put adapters that are in no slot into one each: all of them, or AdapterPoolFull and
        nothing has changed. Those in `stay` do not leave for them."""
        if not states:
            return
        counts = {name: self.store.counts(state) for name, state in states.items()}
        total = [sum(of) for of in zip(*counts.values(), strict=True)]
        self._make_room(list(states), total, len(states), stay)
        for name, state in states.items():
            found = Resident(name, self._free_slots.pop(), self.store.take(counts[name]))
            self.residents[name] = self._by_slot[found.slot] = found
            try:
                self._write(found, state)
            except BaseException:
                self.leave(found)
                raise

    def rewrite(self, found: Resident, state: AdapterState) -> None:
        """Put other weights in the place of an adapter's; AdapterPoolFull leaves it as it was."""
        counts = self.store.counts(state)
        more = [max(0, n - had) for n, had in zip(counts, found.counts, strict=True)]
        self._make_room([found.name], more, 0, [found.name])
        extra = self.store.take(more)
        pages = [own + new for own, new in zip(found.owned, extra, strict=True)]
        found.owned = [p[:n] for p, n in zip(pages, counts, strict=True)]
        self.transfer.after(found.readers.values())
        try:
            self._write(found, state)
        except BaseException:  # half of it is old and half is new
            self.leave(found)
            raise
        finally:
            self.store.give([p[n:] for p, n in zip(pages, counts, strict=True)])

    def leave(self, found: Resident) -> None:
        """Take an adapter out of its slot; who writes its pages next does so after its readers."""
        self.transfer.after(found.readers.values())
        with self.transfer.copying():
            self.store.clear(found.slot)
        self.store.give(found.owned)
        self._free_slots.append(found.slot)
        self._by_slot[found.slot] = None
        del self.residents[found.name]

    def hold(self, name: str) -> Resident:
        """One route more, whose stream goes on when the weights are there; now the last used."""
        found = self.residents[name]
        found.refs += 1
        self.residents.move_to_end(name)
        if self.transfer.wait(found.written):
            found.written = None
        return found

    def let_go(self, held: Sequence[Resident], marks: Marks) -> None:
        """One route less for each, which was over by the marks."""
        for found in held:
            found.refs -= 1
            found.readers.update(marks)

    def in_slot(self, slot: int) -> Resident | None:
        return self._by_slot[slot] if 0 <= slot < len(self._by_slot) else None

    def _write(self, found: Resident, state: AdapterState) -> None:
        with self.transfer.copying():
            self.store.write(found.slot, found.owned, state)
        found.written = self.transfer.written()

    def _make_room(
        self, names: Sequence[str], counts: Counts, slots: int, stay: Sequence[str]
    ) -> None:
        """Evict the least recently used that help, until so many pages and slots are free."""
        short = [n - len(free) for n, free in zip(counts, self.store.free, strict=True)]
        slots -= len(self._free_slots)
        victims: list[Resident] = []
        for found in self._may_leave(stay):
            if slots <= 0 and max(short) <= 0:
                break
            own = found.counts
            if slots > 0 or any(s > 0 and n for s, n in zip(short, own, strict=True)):
                victims.append(found)
                short = [s - n for s, n in zip(short, own, strict=True)]
                slots -= 1
        if slots > 0 or max(short) > 0:
            raise self._full(names, counts, slots, short)
        for found in victims:
            self.leave(found)
        self.evictions += len(victims)

    def _may_leave(self, stay: Sequence[str]) -> Iterator[Resident]:
        return (r for r in self.residents.values() if r.free_to_leave and r.name not in stay)

    def _full(
        self, names: Sequence[str], counts: Counts, slots: int, short: Counts
    ) -> AdapterPoolFull:
        pinned = [r.name for r in self.residents.values() if r.pinned]
        in_use = [r.name for r in self.residents.values() if r.refs]
        if slots > 0:
            lack = f"{slots} more slots than the {len(self._by_slot)} of the pool can give"
        else:
            worst = max(range(len(short)), key=short.__getitem__)
            lack = (
                f"{counts[worst]} pages at {list(self.store.form.modules)[worst]}, {short[worst]} "
                f"more than its {self.store.count} can give"
            )
        return AdapterPoolFull(
            f"no room for {_some(names)}: needs {lack}; pinned: {_some(pinned)}; in use: "
            f"{_some(in_use)}",
            pinned,
            in_use,
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
