"""A command in a process group of its own, which ends with it: at its limit at the latest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 5.0  # seconds for the kernel to end what was killed: a driver call may hold it


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (below 0: the signal), or None where it outran its limit."""

    status: int | None
    seconds: float


def run(
    command: Sequence[str],
    *,
    log: Path | None,
    limit: float,
    env: Mapping[str, str] | None = None,
    watch: Callable[[], bool] = lambda: False,
    own_group: bool = True,
) -> Ended:
    """Run a command.

    Args:
        log: the file that gets all it prints, at its end; None: where ours goes.
        limit: seconds.
        watch: asked several times a second; True ends the command as if at its limit.
        own_group: False leaves it in our group, to end with us.
    """
    start = time.monotonic()
    # A group, not a session: what ends ours from outside, a job's end, ends it as well.
    group: dict[str, Any] = {"process_group": 0} if own_group else {}
    with log.open("ab") if log else nullcontext() as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out else None,
            env=None if env is None else dict(env),
            **group,
        )
    try:
        while child.poll() is None:
            if time.monotonic() - start > limit or watch():
                return Ended(None, time.monotonic() - start)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
    finally:
        # At its limit; where we are interrupted; and whatever it left running.
        end(child, group=own_group)
    return Ended(child.returncode, time.monotonic() - start)


def end(child: subprocess.Popen[bytes], *, group: bool) -> None:
    """Kill the child, or its whole process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(child.pid, signal.SIGKILL)
        elif child.poll() is None:
            child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(PATIENCE)
