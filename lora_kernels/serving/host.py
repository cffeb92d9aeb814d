"""HostCache: copies of adapters on the host, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict

from lora_kernels.serving.state import AdapterState


class HostCache:
    """The least recently used is dropped first. Adapters that can be read from the disk again are
    dropped before those that cannot. One larger than the whole cache is not kept."""

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[str, tuple[AdapterState, bool]] = OrderedDict()

    def put(self, name: str, state: AdapterState, *, on_disk: bool) -> None:
        """Keep an adapter, replacing an older one of the same name."""
        self.drop(name)
        if state.nbytes > self.limit:
            return
        while self.nbytes + state.nbytes > self.limit:
            readable = next((n for n, (_, disk) in self._kept.items() if disk), None)
            if readable is None and on_disk:
                return
            self.drop(readable if readable is not None else next(iter(self._kept)))
        self._kept[name] = state, on_disk
        self.nbytes += state.nbytes

    def get(self, name: str) -> AdapterState | None:
        found = self._kept.get(name)
        if found is None:
            return None
        self._kept.move_to_end(name)
        return found[0]

    def drop(self, name: str) -> None:
        found = self._kept.pop(name, None)
        if found is not None:
            self.nbytes -= found[0].nbytes
