"""The device's address space."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tools.ptxemu.library import Buffer

WINDOW, HALF = 36, 1 << 35  # as in src/machine.h
_MOST = 2990


@dataclass
class _Storage:
    """A storage's place in the list, its memory, and the hull of the views that are valid."""

    index: int
    host: int
    size: int
    low: int
    high: int
    read_only: bool
    name: str
    views: list[Any] = field(default_factory=list)  # kept alive

    @property
    def base(self) -> int:
        return (self.index << WINDOW) + HALF


class Memory:
    """Every storage gets a 64 GiB window of its own, so that an out-of-range address never falls
    into a neighbour. Only the hull of the registered views is valid. `ptr` gives the device
    addresses to put into pointer tables."""

    def __init__(self) -> None:
        self._found: dict[Any, _Storage] = {}

    def ptr(self, t: Any, name: str | None = None, ro: bool = False) -> int:
        """A tensor's or an array's device address; read-only where every use of it is."""
        host, size, low, high = _hull(t)
        key = host if size else ("empty", id(t))
        known = self._found.get(key)
        if known is None:
            if len(self._found) >= _MOST:
                raise ValueError("too many buffers")
            index = len(self._found)
            known = _Storage(index + 1, host, size, low, high, ro, name or f"buf{index}", [t])
            self._found[key] = known
        else:
            known.low, known.high = min(known.low, low), max(known.high, high)
            known.read_only = known.read_only and ro
            known.views.append(t)
            if name and name not in known.name.split("/"):
                known.name += "/" + name
        return known.base + low

    def buffers(self) -> tuple[ctypes.Array[Buffer], int]:
        """As the library takes them."""
        made = (Buffer * max(1, len(self._found)))()
        for i, s in enumerate(self._found.values()):
            name = s.name.encode()
            made[i] = Buffer(s.base, s.host or None, s.size, s.low, s.high, s.read_only, name)
        return made, len(self._found)


def _hull(t: Any) -> tuple[int, int, int, int]:
    """A view's storage: address and bytes; and the bytes of it that the view spans."""
    if isinstance(t, torch.Tensor):
        if t.device.type != "cpu":
            raise ValueError("CPU tensors only")
        storage, size = t.untyped_storage(), t.element_size()
        low = high = int(t.storage_offset()) * size
        if t.numel():
            strides = zip(t.shape, t.stride(), strict=True)
            high += (sum((int(n) - 1) * int(step) for n, step in strides) + 1) * size
        return storage.data_ptr(), storage.nbytes(), low, high
    owner = t
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    host = owner.ctypes.data
    utilities = getattr(np.lib, "array_utils", np)  # where numpy 2 has it
    first, last = utilities.byte_bounds(t)
    low, high = first - host, last - host if t.size else first - host
    if t.ctypes.data - host != low:
        raise ValueError("numpy arrays with negative strides are not supported")
    return host, owner.nbytes, low, high
