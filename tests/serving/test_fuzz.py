"""Random calls of a pool, next to a model of it that is a few dictionaries."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lora_kernels.integrations.peft import key_of
from lora_kernels.ops.gather import pages_of
from lora_kernels.serving import AdapterInUse, AdapterPoolFull
from tests.serving.adapters import SHAPES, adapter, make_pool, save

SLOTS, PAGES, HOST_BYTES = 3, 5, 4000
RANKS = (
    {"up": 3, "mid.down": 3},
    {"up": 17, "mid.down": 1},
    {"up": 40, "mid.down": 40},
    {"up": 16},
    {"mid.down": 33},
)
NAMES = "abcde"


def weights(version: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One of 10 adapters: 5 patterns of ranks, with two sets of values each."""
    ranks = RANKS[version % 5]
    state, config = adapter(version, ranks=ranks, target_modules=list(ranks))
    return {
        k: t for k, t in state.items() if any(k == key_of(m, f) for m in ranks for f in "AB")
    }, config


ADAPTERS = [weights(v) for v in range(10)]
COUNTS = [[pages_of(RANKS[v % 5].get(m, 0)) for m in SHAPES] for v in range(10)]
BYTES = [sum(t.nbytes for t in state.values()) for state, _ in ADAPTERS]

names = st.sampled_from(NAMES)
versions = st.integers(0, 9)
batches = st.lists(st.sampled_from([*NAMES, None]), max_size=4)


class PoolMachine(RuleBasedStateMachine):
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(slots=SLOTS, pages=PAGES, host_bytes=HOST_BYTES)
        self.known: dict[str, tuple[int, bool]] = {}  # version, on the disk
        self.inside: dict[str, dict[str, Any]] = {}  # oldest first: slot, refs, pinned
        self.host: dict[str, int] = {}  # oldest first: version
        self.held: list[list[str | None]] = []
        self.counts = {"hits": 0, "misses": 0, "evictions": 0, "disk_reads": 0}

    # The model

    def keep(self, name: str, version: int) -> None:
        self.host.pop(name, None)
        size = BYTES[version]
        if size > HOST_BYTES:
            return
        while sum(BYTES[v] for v in self.host.values()) + size > HOST_BYTES:
            first = [n for n in self.host if self.known[n][1]]
            if not first and self.known[name][1]:
                return
            del self.host[(first or list(self.host))[0]]
        self.host[name] = version

    def touch(self, of: dict[str, Any], name: str) -> bool:
        if name in of:
            of[name] = of.pop(name)
        return name in of

    def free(self) -> list[int]:
        taken = [COUNTS[self.known[n][0]] for n in self.inside]
        return [PAGES - sum(column) for column in zip(*taken, strict=True)] or [PAGES] * 2

    def victims(self, need: list[int], slots: int, stay: list[str]) -> list[str] | None:
        """Who has to leave; None where nobody's leaving is enough."""
        free, room, out = self.free() if self.inside else [PAGES] * 2, SLOTS - len(self.inside), []
        for name, r in self.inside.items():
            short = [n > f for n, f in zip(need, free, strict=True)]
            if room >= slots and not any(short):
                break
            count = COUNTS[self.known[name][0]]
            helps = room < slots or any(s and c for s, c in zip(short, count, strict=True))
            if r["refs"] or r["pinned"] or name in stay or not helps:
                continue
            out.append(name)
            room, free = room + 1, [f + c for f, c in zip(free, count, strict=True)]
        fits = room >= slots and all(n <= f for n, f in zip(need, free, strict=True))
        return out if fits else None

    def put_out(self, victims: list[str]) -> None:
        for name in victims:
            del self.inside[name]
        self.counts["evictions"] += len(victims)

    def put_in(self, name: str) -> None:
        slot = self.pool.slot_of(name)
        assert slot is not None and all(r["slot"] != slot for r in self.inside.values())
        self.inside[name] = {"slot": slot, "refs": 0, "pinned": False}

    def source(self, version: int, disk: bool) -> tuple[Any, ...]:
        return (self.folder / str(version),) if disk else ADAPTERS[version]

    def ask(self, wanted: list[str], call: Any, counted: bool) -> bool:
        """What every call does that holds adapters; whether it went well."""
        wanted = list(dict.fromkeys(wanted))
        if any(n not in self.known for n in wanted):
            with pytest.raises(KeyError, match="does not know"):
                call()
            return False
        absent = [n for n in wanted if n not in self.inside]
        gone = [n for n in absent if n not in self.host and not self.known[n][1]]
        # The cache is asked for those it has, in order, until one turns out to be gone.
        for n in absent[: absent.index(gone[0])] if gone else absent:
            self.touch(self.host, n)
        if gone:
            with pytest.raises(KeyError, match="was a state dict"):
                call()
            return False
        to_read = [n for n in absent if n not in self.host]
        self.counts["disk_reads"] += len(to_read)
        need = [sum(COUNTS[self.known[n][0]][m] for n in absent) for m in range(2)]
        victims = self.victims(need, len(absent), wanted) if absent else []
        if victims is None:
            with pytest.raises(AdapterPoolFull):
                call()
            return False
        call()
        self.put_out(victims)
        for n in wanted:
            if not self.touch(self.host, n) and n in absent:
                self.keep(n, self.known[n][0])
        for n in absent:
            self.put_in(n)
        for n in wanted:
            self.touch(self.inside, n)
        if counted:
            self.counts["hits"] += len(wanted) - len(absent)
            self.counts["misses"] += len(absent)
        return True

    # The calls

    @rule(name=names, version=versions, disk=st.booleans(), pin=st.booleans())
    def load(self, name: str, version: int, disk: bool, pin: bool) -> None:
        def call() -> None:
            self.pool.load(name, *self.source(version, disk), pin=pin)

        if name in self.known:
            with pytest.raises(ValueError, match="has already"):
                call()
            return
        self.counts["disk_reads"] += disk
        victims = self.victims(COUNTS[version], 1, [])
        if victims is None:
            with pytest.raises(AdapterPoolFull):
                call()
            return
        call()
        self.put_out(victims)
        self.known[name] = version, disk
        self.put_in(name)
        self.inside[name]["pinned"] = pin
        self.keep(name, version)

    @rule(name=names, version=versions)
    def register(self, name: str, version: int) -> None:
        if name in self.known:
            with pytest.raises(ValueError, match="has already"):
                self.pool.register(name, *self.source(version, True))
        else:
            self.pool.register(name, *self.source(version, True))
            self.known[name] = version, True

    @rule(name=names, call=st.sampled_from(["load", "replace"]))
    def load_something_bad(self, name: str, call: str) -> None:
        state, config = ADAPTERS[0]
        state = state | {key_of("up", "B"): torch.full((33, 3), float("nan"))}
        with pytest.raises((ValueError, KeyError, AdapterInUse)):
            getattr(self.pool, call)(name, state, config)

    @rule(name=names, version=versions, disk=st.booleans())
    def replace(self, name: str, version: int, disk: bool) -> None:
        def call() -> None:
            self.pool.replace(name, *self.source(version, disk))

        if name not in self.known:
            with pytest.raises(KeyError):
                call()
            return
        inside = self.inside.get(name)
        if inside and inside["refs"]:
            with pytest.raises(AdapterInUse):
                call()
            return
        self.counts["disk_reads"] += disk
        if inside:
            had = COUNTS[self.known[name][0]]
            more = [max(0, n - h) for n, h in zip(COUNTS[version], had, strict=True)]
            victims = self.victims(more, 0, [name])
            if victims is None:
                with pytest.raises(AdapterPoolFull):
                    call()
                return
            self.put_out(victims)
        call()
        self.known[name] = version, disk
        self.keep(name, version)

    @rule(name=names, call=st.sampled_from(["unload", "evict"]))
    def take_out(self, name: str, call: str) -> None:
        run, inside = getattr(self.pool, call), self.inside.get(name)
        if name not in self.known:
            with pytest.raises(KeyError):
                run(name)
        elif inside and (inside["refs"] or inside["pinned"]):
            with pytest.raises(AdapterInUse):
                run(name)
        else:
            run(name)
            self.inside.pop(name, None)
            if call == "unload":
                self.host.pop(name, None)
                del self.known[name]
            elif inside:
                self.counts["evictions"] += 1

    @rule(name=names)
    def pin(self, name: str) -> None:
        if self.ask([name], lambda: self.pool.pin(name), counted=False):
            self.inside[name]["pinned"] = True

    @rule(name=names)
    def unpin(self, name: str) -> None:
        if name not in self.known:
            with pytest.raises(KeyError):
                self.pool.unpin(name)
            return
        self.pool.unpin(name)
        if name in self.inside:
            self.inside[name]["pinned"] = False

    @rule(batch=st.lists(names, max_size=3))
    def prefetch(self, batch: list[str]) -> None:
        self.ask(batch, lambda: self.pool.prefetch(batch), counted=False)

    @rule(batch=batches)
    def acquire(self, batch: list[str | None]) -> None:
        wanted = [n for n in batch if n]
        slots: list[torch.Tensor] = []
        if self.ask(wanted, lambda: slots.append(self.pool.acquire(batch)), counted=True):
            for name in set(wanted):
                self.inside[name]["refs"] += 1
            self.held.append(batch)
            assert slots[0].dtype == torch.int32
            assert slots[0].tolist() == [self.inside[n]["slot"] if n else -1 for n in batch]

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        batch = self.held.pop(which % len(self.held))
        self.pool.release(batch)
        for name in {n for n in batch if n}:
            self.inside[name]["refs"] -= 1

    # What holds at any time

    @invariant()
    def the_model_agrees(self) -> None:
        stats = self.pool.stats()
        assert self.pool.names() == tuple(self.inside)
        assert stats.known == len(self.known) and stats.loaded == len(self.inside)
        assert stats.pinned == sum(r["pinned"] for r in self.inside.values())
        assert stats.in_use == sum(r["refs"] > 0 for r in self.inside.values())
        assert {k: getattr(stats, k) for k in self.counts} == self.counts
        assert stats.host_bytes == sum(BYTES[v] for v in self.host.values()) <= HOST_BYTES
        used = sum(sum(COUNTS[self.known[n][0]]) for n in self.inside)
        assert (stats.pages_used, stats.pages_free) == (used, 2 * PAGES - used)

    @invariant()
    def every_adapter_is_whole_and_shares_no_page(self) -> None:
        by_slot = {r["slot"]: n for n, r in self.inside.items()}
        for module in SHAPES:
            pages, seen = self.pool.pages(module).check(), []
            for slot in range(SLOTS):
                rank = int(pages.ranks[slot])
                if slot not in by_slot:
                    assert rank == 0
                    continue
                version = self.known[by_slot[slot]][0]
                state = ADAPTERS[version][0]
                assert rank == RANKS[version % 5].get(module, 0)
                if not rank:
                    continue
                own = pages.table[slot, : pages_of(rank)].tolist()
                seen += own
                assert torch.equal(pages.a[own].flatten(0, 1)[:rank], state[key_of(module, "A")])
                assert torch.equal(pages.b[own].flatten(0, 1)[:rank].T, state[key_of(module, "B")])
                assert float(pages.scales[slot]) == torch.tensor(6 / rank).item()
            assert len(seen) == len(set(seen))

    def teardown(self) -> None:
        for batch in self.held:
            self.pool.release(batch)
        for name in list(self.known):
            self.pool.unpin(name)
            self.pool.unload(name)
        assert self.pool.stats().pages_free == 2 * PAGES


def test_random_calls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PoolMachine.folder = Path(folder)
        for version, (state, config) in enumerate(ADAPTERS):
            save(PoolMachine.folder / str(version), state, config)
        case = PoolMachine.TestCase
        case.settings = settings(
            max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None
        )
        case().runTest()
