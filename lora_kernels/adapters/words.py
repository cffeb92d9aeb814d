"""Words for messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def first_few(names: Sequence[str], count: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    if not names:
        return "none"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def by_reason(what: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason of (name, reason) pairs, with the first names that have it."""
    reasons: dict[str, list[str]] = {}
    for name, reason in pairs:
        reasons.setdefault(reason, []).append(name)
    return [f"{what} ({reason}): {first_few(names, 3)}" for reason, names in reasons.items()]
