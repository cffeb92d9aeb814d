"""Showing how many of a model's layers are converted: a bar, or a function that is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

Progress = Callable[[int, int, str], None]
BAR_AFTER = 2.0  # seconds until a bar that was not asked for shows


def with_progress(names: Sequence[str], progress: bool | Progress | None) -> Iterable[str]:
    """The names, with `progress` told about each.

    Args:
        progress: True for a bar, False for none, or a function of (done, total, name). None shows
            the bar after `BAR_AFTER` seconds, if standard error is a terminal and tqdm is there.

    Raises:
        ImportError: a bar was asked for and tqdm is not installed.
    """
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
    # disable=None disables it if standard error is not a terminal
    unasked = {} if progress else {"delay": BAR_AFTER, "disable": None}
    return tqdm(names, desc="adapters", unit="layer", **unasked)


def _telling(names: Sequence[str], progress: Progress) -> Iterator[str]:
    for done, name in enumerate(names):
        progress(done, len(names), name)
        yield name
    if names:
        progress(len(names), len(names), names[-1])
