"""What a pool refuses because of what else it holds."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterPoolFull(RuntimeError):
    """Nothing that could be evicted makes enough room; the pool is as it was.

    Attributes:
        pinned: names of the adapters that are pinned.
        in_use: names of those that a route holds.
    """

    def __init__(self, message: str, pinned: Sequence[str] = (), in_use: Sequence[str] = ()):
        super().__init__(message)
        self.pinned, self.in_use = tuple(pinned), tuple(in_use)


class AdapterInUse(RuntimeError):
    """The adapter is pinned or held by a route, so it stays as it is."""
