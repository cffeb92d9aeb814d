"""AdapterRegistry: the adapters that a pool knows by name, and their copies on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_kernels.serving.host import HostCache
from lora_kernels.serving.state import AdapterState, Source


@dataclass(eq=False)
class Origin:
    """Where an adapter comes from. Every load and replace makes a new one.

    Attributes:
        folder: its directory; None for a state dict, which only the host's cache keeps.
    """

    folder: Path | None


ReadStates = dict[str, tuple[Origin, AdapterState]]  # read from directories, by name


class AdapterRegistry:
    """Names, origins and the host's cache. The caller holds the pool's lock."""

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

    def add(self, name: str, source: Source, state: AdapterState) -> None:
        """Keep an adapter's origin and a copy of it, in place of an older one of this name."""
        folder = None if isinstance(source, Mapping) else Path(source)
        self.known[name] = Origin(folder)
        self.host.put(name, state, on_disk=folder is not None)

    def remove(self, name: str) -> None:
        self.host.drop(name)
        del self.known[name]

    def find(self, name: str, read: ReadStates) -> AdapterState | Path:
        """The adapter, if the cache or `read` has it, else the directory to read it from."""
        origin = self.origin(name)
        state = self.host.get(name)
        if state is not None:
            return state
        if origin.folder is None:
            raise KeyError(
                f"name: {name!r} was a state dict, which has left the pool and the host's cache; "
                "give it again with replace"
            )
        # With another origin the adapter was replaced while it was read.
        return read[name][1] if name in read and read[name][0] is origin else origin.folder

    def mark_used(self, names: Iterable[str], states: Mapping[str, AdapterState]) -> None:
        """Note the adapters of a route as used last, and cache the states that were just loaded."""
        for name in names:
            if self.host.get(name) is None and name in states:
                self.host.put(name, states[name], on_disk=self.known[name].folder is not None)
