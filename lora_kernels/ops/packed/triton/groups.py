"""Launches of up to three projections: which, and how the kernels name their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

PER_LAUNCH = 3  # projections


def groups(count: int) -> Iterator[range]:
    """The projections of each launch."""
    for first in range(0, count, PER_LAUNCH):
        yield range(first, min(first + PER_LAUNCH, count))


def numbered(
    values: Sequence[dict[str, object]], absent: dict[str, object] | None = None
) -> dict[str, object]:
    """Each projection's arguments by the kernels' names; what is not there is `absent`, or the
    first once more, where it is never picked."""
    slots = [*values, *([absent or values[0]] * (PER_LAUNCH - len(values)))]
    return {f"{name}_{i}": v for i, slot in enumerate(slots) for name, v in slot.items()}


def ends(widths: Sequence[int], block: int) -> list[int]:
    """Where each projection's blocks end, those of all counted through."""
    found = [ceil(n / block) for n in widths]
    return [sum(found[: i + 1]) for i in range(PER_LAUNCH)]
