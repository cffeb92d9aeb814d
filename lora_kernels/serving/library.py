"""Library: the adapters that a pool knows by name, and their copies on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.serving.host import HostCache
from lora_kernels.serving.state import AdapterState, Source


@dataclass(eq=False)
class Origin:
    """Where an adapter comes from; another one with every load and replace.

    Attributes:
        folder: its directory; None for a state dict, which is nowhere but on the host.
    """

    folder: Path | None


Read = dict[str, tuple[Origin, AdapterState]]


class Library:
    """Names, origins and the host's cache. Whoever calls holds the pool's lock."""

    def __init__(self, host_bytes: int) -> None:
        self.known: dict[str, Origin] = {}
        self.host = HostCache(host_bytes)

    def origin(self, name: str) -> Origin:
        found = self.known.get(name)
        if found is None:
            raise KeyError(f"name: got {name!r}, which the pool does not know; load it first")
        return found

    def check_new(self, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: got {name!r}, expected a string that is not empty")
        if name in self.known:
            raise ValueError(f"name: got {name!r}, which the pool has already; use replace")

    def remember(self, name: str, source: Source, state: AdapterState) -> None:
        folder = None if isinstance(source, Mapping) else Path(source)
        self.known[name] = Origin(folder)
        self.host.put(name, state, on_disk=folder is not None)

    def forget(self, name: str) -> None:
        self.host.drop(name)
        del self.known[name]

    def find(self, name: str, read: Read) -> AdapterState | Path:
        """The adapter, where the cache or `read` has it, else the directory to read it from."""
        origin = self.origin(name)
        state = self.host.get(name)
        if state is not None:
            return state
        if origin.folder is None:
            raise KeyError(
                f"name: {name!r} was a state dict, which has left the pool and the host's cache; "
                "give it again with replace"
            )
        # Another origin: the adapter was replaced while it was read.
        return read[name][1] if name in read and read[name][0] is origin else origin.folder

    def used(self, names: Iterable[str], states: Mapping[str, AdapterState]) -> None:
        """Adapters that a route has asked for, and the states of those that were brought."""
        for name in names:
            if self.host.get(name) is None and name in states:
                self.host.put(name, states[name], on_disk=self.known[name].folder is not None)
