"""A progress bar for each stage; plain lines if the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Tick = Callable[[str], None]
LINES = 4  # lines of a stage without a bar


@contextmanager
def stage(console: Console, title: str, total: int) -> Iterator[Tick]:
    """Yield a function to call after each of `total` steps, with a note about the step."""
    if console.is_terminal:
        columns = (
            TextColumn(title),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda note: bar.update(task, advance=1, note=note)
        return
    done = 0

    def tick(note: str) -> None:
        nonlocal done
        done += 1
        if done * LINES // total > (done - 1) * LINES // total:
            console.print(f"{title} {done}/{total}  {note}".rstrip())

    yield tick
