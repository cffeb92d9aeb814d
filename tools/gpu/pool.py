"""Jobs in processes that may die: one job's end is its own, the others go on.

A job is "module:function" with arguments that JSON takes; the function returns what JSON takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.gpu.files import DIED, FAILED, HUNG, OK

READY = {"ready": True}


@dataclass(frozen=True)
class Job:
    """A call of `function` ("module:name") with keyword arguments, and its limit in seconds."""

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0


@dataclass(frozen=True)
class Done:
    """How a job ended: ok with what it returned; failed, died or hung with a note."""

    job: Job
    status: str
    value: Any = None
    note: str = ""
    seconds: float = 0.0


class Worker:
    """A process that runs jobs one after the other. It is started at the first one, and again after
    its death."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None
        self.errors: Any = None

    def run(self, job: Job) -> Done:
        start = time.monotonic()
        try:
            if self.child is None and not self._start(job.limit + 60):
                return Done(job, DIED, note=f"its process did not start: {self._last_words()}")
            answer = self._ask({"function": job.function, "arguments": job.arguments}, job.limit)
        finally:
            seconds = time.monotonic() - start
        if answer is None:
            hung = self.child is not None and self.child.poll() is None
            self.close()
            note = f"not done after {job.limit:.0f} s" if hung else self._last_words()
            return Done(job, HUNG if hung else DIED, note=note, seconds=seconds)
        if answer.get("lost"):  # the device is of no more use to that process
            self.close()
        if "error" in answer:
            return Done(job, FAILED, note=answer["error"], seconds=seconds)
        return Done(job, OK, answer.get("value"), seconds=seconds)

    def _start(self, limit: float) -> bool:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )  # in our group, to end with it
        return self._read(limit) == READY

    def _ask(self, message: dict[str, Any], limit: float) -> dict[str, Any] | None:
        assert self.child is not None and self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(message) + "\n")
            self.child.stdin.flush()
        except OSError:
            return None
        return self._read(limit)

    def _read(self, limit: float) -> dict[str, Any] | None:
        assert self.child is not None and self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], limit)
        if not ready:
            return None
        line = self.child.stdout.readline()  # written whole
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(5)
            return None
        return dict(json.loads(line))

    def _last_words(self) -> str:
        """Why it died, as far as it said."""
        status = self.child.poll() if self.child is not None else None
        with contextlib.suppress(OSError, ValueError):
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
            # Of faulthandler's report its head; else the last line.
            fatal = [line for line in lines if line.startswith("Fatal Python error")]
            words = (fatal or lines or ["it said nothing"])[-1]
            return f"its process ended with status {status}: {words}"
        return f"its process ended with status {status}"

    def close(self) -> None:
        if self.child is None:
            return
        with contextlib.suppress(OSError):
            os.kill(self.child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5)
        self.child = None


def run(jobs: Sequence[Job], processes: int, tell: Callable[[Done], object]) -> None:
    """Run all jobs, so many at a time; `tell` hears of each as it ends, one at a time."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    speak = threading.Lock()

    def work() -> None:
        worker = Worker()
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                done = worker.run(job)
                with speak:
                    tell(done)
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(processes, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
