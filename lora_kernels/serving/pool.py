"""AdapterPool: many adapters of one model in bounded memory, one for each row of a batch."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.adapters.reading import weights_file
from lora_kernels.integrations.peft import ALL_LINEAR, CONFIG_FILE, check_directory
from lora_kernels.ops.common.checks import names as dtype_names
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.gather import RankPages
from lora_kernels.serving.errors import AdapterInUse
from lora_kernels.serving.registry import AdapterRegistry, Origin, ReadStates
from lora_kernels.serving.routing import activated, active_route, distinct, row_names, slots_of
from lora_kernels.serving.slots import LoadedAdapter, SlotAllocator
from lora_kernels.serving.spec import PoolSpec, Shapes, make_spec, positive
from lora_kernels.serving.state import AdapterState, Source, read_state
from lora_kernels.serving.stats import PoolStats

HOST_BYTES = 1 << 30


class AdapterPool:
    """Adapters in a fixed number of rank pages, loaded by name and evicted when room is needed.

    An adapter of rank r takes one slot, and ceil(r / 16) pages at each of its modules. The least
    recently used adapter is evicted first. One that a route holds, or that is pinned, is never
    evicted; `AdapterPoolFull` is raised if that leaves no room. An evicted adapter is loaded again
    when it is next used, from the host's cache or from its directory. All methods may be called
    from any thread, and no lock is held while files are read. On CUDA, weights are copied on a
    stream of their own, and routes wait for them on the device.

    Args:
        model: the pool serves its target layers; the model is not changed. Or
            {name: (in_features, out_features)}.
        slots: how many adapters can be loaded at one time.
        pages: how many pages each module has. Give this or `memory`.
        memory: bytes of all pages and tables together.
        max_rank: the highest rank that an adapter may have.
        dtype, device: of the pages; the model's by default.
        target_modules, exclude_modules: which layers of a model, as in `apply_lora`, and which
            embeddings, where one is named.
        host_bytes: the size of the host's cache.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range, the model has
            no such layer, or adapters already.

    Examples:
        >>> pool = lk.serving.AdapterPool({"q_proj": (64, 32)}, slots=2, pages=2)
        >>> state = {
        ...     "base_model.model.q_proj.lora_A.weight": torch.randn(8, 64),
        ...     "base_model.model.q_proj.lora_B.weight": torch.randn(32, 8),
        ... }
        >>> config = lk.LoRAConfig(r=8, target_modules=["q_proj"])
        >>> pool.load("french", state, config)
        0
        >>> pool.acquire(["french", None])  # the slot of each row
        tensor([ 0, -1], dtype=torch.int32)
        >>> pool.release(["french", None])
    """

    def __init__(
        self,
        model: nn.Module | Shapes,
        *,
        slots: int,
        pages: int | None = None,
        memory: int | None = None,
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        target_modules: str | Iterable[str] = ALL_LINEAR,
        exclude_modules: str | Iterable[str] = (),
        host_bytes: int = HOST_BYTES,
    ) -> None:
        self.slots = positive("slots", slots)
        if isinstance(host_bytes, bool) or not isinstance(host_bytes, int) or host_bytes < 0:
            raise ValueError(f"host_bytes: got {host_bytes!r}, expected an int of at least 0")
        if (pages is None) == (memory is None):
            raise ValueError(f"pages: got {pages} and memory={memory}, expected one of them")
        check_kinds(AdapterPool.__init__, locals())
        self.spec = make_spec(
            model,
            max_rank=max_rank,
            dtype=dtype,
            device=device,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
        )
        if memory is not None:
            pages = self.spec.pages_in(memory, slots)
        self._allocator = SlotAllocator(self.spec, slots, positive("pages", pages))
        self._lock = threading.Lock()
        self._registry = AdapterRegistry(host_bytes)
        self._hits = self._misses = self._evicted = self._disk_reads = 0

    # A copy of a model with a pool attached shares the pool, whose pages are not the model's.
    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterPool:
        return self

    @property
    def modules(self) -> Shapes:
        """(in_features, out_features) of every module by name."""
        return self.spec.modules

    @property
    def form(self) -> PoolSpec:
        """Deprecated: the old name of `spec`."""
        warnings.warn("AdapterPool.form is now spec", DeprecationWarning, stacklevel=2)
        return self.spec

    @property
    def device(self) -> torch.device:
        return self.spec.device

    def pages(self, module: str) -> RankPages:
        """The rank pages of a module. They are the same tensors as long as the pool exists."""
        found = self._allocator.store.modules.get(module)
        if found is None:
            raise KeyError(f"module: got {module!r}, expected one of {', '.join(self.modules)}")
        return found

    def names(self) -> tuple[str, ...]:
        """The loaded adapters, least recently used first."""
        with self._lock:
            return tuple(self._allocator.loaded)

    def slot_of(self, name: str) -> int | None:
        """The slot of an adapter; None while it is not loaded."""
        with self._lock:
            self._registry.origin(name)
            found = self._allocator.loaded.get(name)
            return None if found is None else found.slot

    def register(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Give an adapter's directory a name. It is read when a route first uses it."""
        folder = check_directory(directory)
        for file in (folder / CONFIG_FILE, weights_file(folder)):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file")
        with self._lock:
            self._registry.check_new(name)
            self._registry.known[name] = Origin(folder)

    def load(self, name: str, source: Source, config: object = None, *, pin: bool = False) -> int:
        """Check an adapter and put it into a slot.

        Args:
            name: one that the pool does not know yet.
            source: a directory that PEFT or `save_adapter` wrote, or a state dict with PEFT's keys.
                A state dict is copied. Once it has left both the pool and the host's cache, it
                has to be given again (`replace`).
            config: of a state dict, PEFT's configuration: a mapping, `LoRAConfig` or PEFT's own.
            pin: keep it in its slot until `unpin`.

        Returns:
            The slot.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `load_adapter`; and for a rank over
                max_rank, DoRA, or modules that the pool does not have. The pool is unchanged.
            AdapterPoolFull: evicting all that may be evicted makes too little room. The pool is
                unchanged.
        """
        with self._lock:
            self._registry.check_new(name)
        state = self._read(source, config)
        with self._lock:
            self._registry.check_new(name)
            self._allocator.load({name: state})
            self._registry.add(name, source, state)
            found = self._allocator.loaded[name]
            found.pinned = bool(pin)
            return found.slot

    def replace(self, name: str, source: Source, config: object = None) -> None:
        """Replace the weights of a known adapter. Its slot, pin and place in the order of use stay.

        The old weights stay until the new ones are checked and have all the pages that they need.
        An adapter that is not loaded is not loaded by this.

        Raises:
            KeyError: the name is not known.
            AdapterInUse: a route holds the adapter.
            FileNotFoundError, ValueError, TypeError, AdapterPoolFull: as `load`.
        """
        with self._lock:
            self._check_idle(name, "be replaced")
        state = self._read(source, config)
        with self._lock:
            found = self._check_idle(name, "be replaced")
            if found is not None:
                self._allocator.overwrite(found, state)
            self._registry.add(name, source, state)

    def unload(self, name: str) -> None:
        """Remove an adapter: its slot, its pages, its copy on the host and its name.

        Raises:
            KeyError: the name is not known.
            AdapterInUse: the adapter is pinned or held by a route.
        """
        with self._lock:
            found = self._check_idle(name, "be unloaded", unpinned=True)
            if found is not None:
                self._allocator.evict(found)
            self._registry.remove(name)

    def evict(self, name: str) -> None:
        """Take an adapter out of its slot, if it is loaded. Its next use loads it again.

        Raises as `unload`.
        """
        with self._lock:
            found = self._check_idle(name, "be evicted", unpinned=True)
            if found is not None:
                self._allocator.evict(found)
                self._evicted += 1

    def pin(self, name: str) -> None:
        """Load a known adapter if necessary, and keep it in its slot. Raises as `acquire`."""
        with self._lock:
            self._registry.origin(name)
        held = self._hold([name], counted=False)
        with self._lock:
            held[0].pinned = True
        self._release(held)

    def unpin(self, name: str) -> None:
        """Allow a pinned adapter to be evicted again."""
        with self._lock:
            self._registry.origin(name)
            if name in self._allocator.loaded:
                self._allocator.loaded[name].pinned = False

    def prefetch(self, names: Iterable[str]) -> None:
        """Load known adapters, all of them or none. Raises as `acquire`."""
        self._release(self._hold(row_names(names), counted=False))

    def acquire(self, names: Sequence[str | None]) -> Tensor:
        """Hold the adapters of a batch's rows until `release`, loading those that are not loaded.

        Args:
            names: the adapter of each row; None or "" for no adapter.

        Returns:
            int32 [rows] on the pool's device; −1 for no adapter.

        Raises:
            KeyError: a name is not known, or its state dict is gone.
            AdapterPoolFull: the adapters do not fit beside those that are pinned or in use; the
                pool is unchanged.
            FileNotFoundError, ValueError, TypeError: as `load`, for a directory.
        """
        rows = row_names(names)
        return self._slots(rows, self._hold(rows))

    def release(self, names: Sequence[str | None]) -> None:
        """Stop holding what `acquire` of the same names holds.

        Raises:
            ValueError: one of them is not held.
        """
        wanted, events = distinct(row_names(names)), self._allocator.transfer.events()
        with self._lock:
            loaded = self._allocator.loaded
            for name in wanted:
                if name not in loaded or not loaded[name].refs:
                    raise ValueError(f"names: got {name!r}, which nobody holds")
            self._allocator.release([loaded[name] for name in wanted], events)

    @contextmanager
    def route(self, rows: Sequence[str | None] | Tensor) -> Iterator[Tensor]:
        """`with pool.route(names):` makes the pool's layers use these adapters inside the block.

        Only this thread or asyncio task sees the route. An inner route hides an outer one.

        Args:
            rows: the adapter of each row (None or "" for no adapter). Or the slots of loaded
                adapters, int32 [B], [B, T] or [B·T], −1 for no adapter; the host reads them,
                and so waits for the device.

        Yields:
            The slots. Raises as `acquire`; ValueError for a slot without an adapter.
        """
        if isinstance(rows, Tensor):
            held = self._hold_slots(rows)
            slots = rows.to(self.device, torch.int32, copy=True)
        else:
            given = row_names(rows)
            held = self._hold(given)
            slots = self._slots(given, held)
        try:
            # With None the layers call their bases only, so a batch without adapters costs nothing.
            with activated(self, slots if held else None):
                yield slots
        finally:
            self._release(held)

    def active_slots(self) -> Tensor | None:
        """The slots of the innermost route; None outside any, or where no row has an adapter."""
        route = active_route(self)  # every layer asks: no call more than needed
        return None if route is None else route.slots

    def active_tokens(self) -> tuple[int, int] | None:
        """(batch, tokens) of the model's last input inside the route; None if none was seen."""
        route = active_route(self)
        return None if route is None else route.tokens

    def stats(self) -> PoolStats:
        """What the pool holds, and counts since it was made."""
        with self._lock:
            store, loaded = self._allocator.store, self._allocator.loaded.values()
            free, total = store.pages_free, store.count * len(self.modules)
            return PoolStats(
                known=len(self._registry.known),
                loaded=len(loaded),
                pinned=sum(a.pinned for a in loaded),
                in_use=sum(a.refs > 0 for a in loaded),
                slots=self.slots,
                pages_used=total - free,
                pages_free=free,
                hits=self._hits,
                misses=self._misses,
                evictions=self._allocator.evictions + self._evicted,
                disk_reads=self._disk_reads,
                device_bytes=store.device_bytes,
                used_bytes=store.used_bytes,
                host_bytes=self._registry.host.nbytes,
            )

    def _read(self, source: Source, config: object = None) -> AdapterState:
        """Read an adapter. Called without the lock, for a disk is slow."""
        state = read_state(source, config, self.spec)
        if not isinstance(source, Mapping):
            with self._lock:
                self._disk_reads += 1
        return state

    def _hold(self, names: Sequence[str | None], *, counted: bool = True) -> list[LoadedAdapter]:
        """Hold each adapter once more, loading those that are not loaded, all of them or none."""
        wanted, loaded = distinct(names), self._allocator.loaded
        read: ReadStates = {}
        while True:
            with self._lock:
                origins = {name: self._registry.origin(name) for name in wanted}
                absent = [name for name in wanted if name not in loaded]
                found = {name: self._registry.find(name, read) for name in absent}
                folders = {n: f for n, f in found.items() if isinstance(f, Path)}
                if not folders:
                    states = {n: s for n, s in found.items() if isinstance(s, AdapterState)}
                    self._allocator.load(states, keep=wanted)
                    self._registry.mark_used(wanted, states)
                    if counted:
                        self._hits += len(wanted) - len(absent)
                        self._misses += len(absent)
                    return [self._allocator.hold(name) for name in wanted]
            for name, folder in folders.items():
                read[name] = origins[name], self._read(folder)

    def _slots(self, rows: Sequence[str | None], held: Sequence[LoadedAdapter]) -> Tensor:
        try:
            return slots_of(rows, {a.name: a.slot for a in held}, self.device)
        except BaseException:
            self._release(held)
            raise

    def _hold_slots(self, slots: Tensor) -> list[LoadedAdapter]:
        if slots.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slots: got dtype {dtype_names([slots.dtype])}, expected int32")
        wanted = [s for s in slots.unique().tolist() if s != -1]
        with self._lock:
            return [self._allocator.hold(name) for name in self._allocator.names_in(wanted)]

    def _release(self, held: Sequence[LoadedAdapter]) -> None:
        events = self._allocator.transfer.events()
        with self._lock:
            self._allocator.release(held, events)

    def _check_idle(self, name: str, what: str, *, unpinned: bool = False) -> LoadedAdapter | None:
        """The adapter if it is loaded; AdapterInUse if it may not be changed."""
        self._registry.origin(name)
        found = self._allocator.loaded.get(name)
        if found is not None and found.refs:
            raise AdapterInUse(f"{name!r} cannot {what}: {found.refs} route(s) hold it")
        if found is not None and found.pinned and unpinned:
            raise AdapterInUse(f"{name!r} cannot {what}: it is pinned")
        return found
