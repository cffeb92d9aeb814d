"""Words for messages."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str], count: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
