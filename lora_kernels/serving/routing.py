"""Which rows of a batch use which slots right now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Route:
    """What the layers of a pool need to know inside a `with pool.route(...)` block.

    Attributes:
        slots: of each row or token; None where no row has an adapter.
        tokens: (batch, tokens) of the last input of a model with the pool; None before one was
            seen.
    """

    slots: Tensor | None
    tokens: tuple[int, int] | None = None


# (pool, route), the innermost last. Each thread and each asyncio task has its own.
_ACTIVE: ContextVar[tuple[tuple[object, Route], ...]] = ContextVar("active routes", default=())


@contextmanager
def activated(pool: object, slots: Tensor | None) -> Iterator[None]:
    """Make these the slots that the pool's layers see. An inner route hides an outer one."""
    token = _ACTIVE.set((*_ACTIVE.get(), (pool, Route(slots))))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_route(pool: object) -> Route | None:
    """The innermost route of this thread or task; None outside any."""
    for owner, route in reversed(_ACTIVE.get()):
        if owner is pool:
            return route
    return None


def row_names(rows: Iterable[str | None]) -> list[str | None]:
    """The adapters' names of a batch's rows, checked, as a list."""
    if isinstance(rows, str):
        raise TypeError(f"names: got the string {rows!r}, expected one name for each row")
    names = list(rows)
    for name in names:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"names: got {name!r}, expected a string or None")
    return names


def distinct(names: Iterable[str | None]) -> list[str]:
    """Each adapter's name once, without the rows that have none."""
    return list(dict.fromkeys(name for name in names if name))


def slots_of(names: Sequence[str | None], slots: Mapping[str, int], device: torch.device) -> Tensor:
    """int32 on the device, the slot of each name; −1 for None and ""."""
    numbers = [slots[name] if name else -1 for name in names]
    host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
