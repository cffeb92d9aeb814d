"""PoolStats: what a pool holds, and counts of what it did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds at one moment, and counts since it was made.

    Attributes:
        known: adapters that the pool knows by name.
        loaded: known adapters that are in a slot.
        pinned, in_use: loaded adapters that are pinned, and that a route holds.
        slots: all slots, used or free.
        pages_used, pages_free: sums over all modules.
        hits, misses: adapters that `acquire` found loaded, and that it had to load.
        evictions: adapters taken out of their slot because another one needed it, or by `evict`.
        disk_reads: directories read and found valid.
        device_bytes: size of all pages and tables, fixed when the pool is made.
        used_bytes: size of the pages in use and of all tables.
        host_bytes: size of what the host's cache holds.

    Examples:
        >>> pool = lk.serving.AdapterPool({"q_proj": (64, 32)}, slots=2, pages=2)
        >>> stats = pool.stats()
        >>> stats.loaded, stats.slots, stats.pages_free
        (0, 2, 2)
    """

    known: int
    loaded: int
    pinned: int
    in_use: int
    slots: int
    pages_used: int
    pages_free: int
    hits: int
    misses: int
    evictions: int
    disk_reads: int
    device_bytes: int
    used_bytes: int
    host_bytes: int
