"""A bar, or a function that is told, while a model's layers are converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

Progress = Callable[[int, int, str], None]
BAR_AFTER = 2.0  # seconds; a bar that nobody asked for waits so long


def with_progress(names: list[str], progress: bool | Progress | None) -> Iterable[str]:
    if callable(progress):
        return _telling(names, progress)
    if progress is False:
        return names
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        return names
    # disable=None: where standard error is no terminal
    unasked = {} if progress else {"delay": BAR_AFTER, "disable": None}
    return tqdm(names, desc="adapters", unit="layer", **unasked)


def _telling(names: list[str], progress: Progress) -> Iterator[str]:
    for done, name in enumerate(names):
        progress(done, len(names), name)
        yield name
    if names:
        progress(len(names), len(names), names[-1])
