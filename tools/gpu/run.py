"""Runs the steps of the phases, each in a process group that ends at its limit."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu import child, files
from tools.gpu.context import Context, answer_file, environment
from tools.gpu.plan import PHASES, Step
from tools.gpu.state import CUT, DIED, FINAL, OK, RUNNING, WAITING, WRONG, State

LEAST = 5.0  # seconds: a step that would have less waits for the next run
PUBLISH_EVERY = 2.0  # seconds


class Interrupted(Exception):
    """A signal asked us to end."""


@dataclass
class Runner:
    """One run.

    Attributes:
        steps: what to run, in order.
        limits: seconds of each phase; a step's own limit grows with it.
        output: where the files come to, from `work`.
        command: what runs a step; tests put their own in its place.
    """

    steps: Sequence[Step]
    state: State
    device: str
    work: Path
    output: Path
    processes: int
    sample: float
    dry: bool
    limits: dict[str, float] = field(default_factory=lambda: dict(PHASES))
    command: Callable[[Context], list[str]] = lambda context: [
        sys.executable, "-m", "tools.gpu.step", context.step, *context.arguments()
    ]  # fmt: skip
    _spent: dict[str, float] = field(default_factory=dict)
    _published: float = 0.0
    _stopped: str | None = None

    @property
    def log(self) -> Path:
        return self.work / files.LOG

    def run(self) -> int:
        """The exit status: 0 all is well; 1 a step found something wrong or died; 3 nothing was,
        but time ran out; 4 the run stopped, nothing can be measured here."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _interrupt)
        try:
            for step in self.steps:
                self._step(step)
        except Interrupted as reason:
            self._say(f"== interrupted: {reason}")
        except OSError as error:  # a full disk, say
            self._stopped = f"{type(error).__name__}: {error}"
        return self._end()

    def _step(self, step: Step) -> None:
        before = self.state.doc["steps"].get(step.name, {})
        if before.get("status") in FINAL and not before.get("stop"):
            words = f"{before['status']}, from an earlier run: {before['words']}"
            self._say(f"== {step.name}: {words}")
            return
        if self._stopped:
            self.state.set(step.name, WAITING, f"the run stopped: {self._stopped}")
            return
        whole = self.limits[step.phase]
        own = step.limit * max(1.0, whole / PHASES[step.phase])
        left = own if step.outside else whole - self._spent.get(step.phase, 0.0)
        if left < LEAST:
            words = f"phase {step.phase} had used up its {whole:.0f} s"
            self.state.set(step.name, WAITING, words)
            self._say(f"== {step.name}: not run: {words}")
            return
        limit = min(own, left)
        context = Context(
            step.name, self.device, self.work, self.processes, self.sample, limit, self.dry
        )
        self._say(f"== {step.name} ({step.says}; at most {limit:.0f} s)")
        self._run(step, context, limit)

    def _run(self, step: Step, context: Context, limit: float) -> None:
        answer = answer_file(self.work, step.name)
        answer.unlink(missing_ok=True)
        files.without(self.work / files.CORRECTNESS, step.name)
        self.state.set(step.name, RUNNING, "not ended yet")
        try:
            ended = child.run(
                self.command(context), log=self.log, limit=limit, env=environment(self.dry),
                watch=self._watch,
            )  # fmt: skip
        except Interrupted:
            self.state.set(step.name, CUT, "interrupted")
            raise
        if not step.outside:
            self._spent[step.phase] = self._spent.get(step.phase, 0.0) + ended.seconds
        said = files.read_json(answer)
        facts = {} if said is None else {"facts": said["facts"], "stop": said["stop"]}
        if said is not None:
            status, words = OK if said["ok"] else WRONG, said["words"]
        elif ended.status is None:
            status, words = CUT, f"ended at its limit of {limit:.0f} s"
        else:
            status, words = DIED, f"its process ended with status {ended.status}: {self._last()}"
        # Without a device that answers nothing below can be right.
        if facts.get("stop") or (step.name == "environment" and status != OK):
            self._stopped = words
            facts["stop"] = True
        self.state.set(step.name, status, words, ended.seconds, **facts)
        self._say(f"== {step.name}: {status} after {ended.seconds:.1f} s: {words}")
        self._publish()

    def _watch(self) -> bool:
        if time.monotonic() - self._published > PUBLISH_EVERY:
            self._publish()
        return False

    def _publish(self) -> None:
        files.publish(self.work, self.output)
        self._published = time.monotonic()

    def _last(self) -> str:
        """The end of the log."""
        text = self.log.read_text(errors="replace").strip().splitlines()
        return text[-1] if text else ""

    def _say(self, line: str) -> None:
        with self.log.open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)

    def _end(self) -> int:
        status, words = self.verdict()
        try:
            self.state.doc["verdict"] = words
            self.state.save()
            print(f"written: {self.output}", flush=True)
            self._say(f"verdict: {words}")
            self._publish()
        except OSError as error:
            print(f"the files could not be written: {error}", file=sys.stderr)
            return 1
        return status

    def verdict(self) -> tuple[int, str]:
        """The exit status, and one line."""
        named: dict[str, list[str]] = {}
        for step in self.steps:
            named.setdefault(self.state.status(step.name), []).append(step.name)
        parts = [f"{len(named.get(OK, []))} of {len(self.steps)} steps ok"]
        parts += [
            f"{status}: {', '.join(names)}"
            for status, names in named.items()
            if status not in (OK,)
        ]  # fmt: skip
        if self._stopped:
            return 4, "stopped: " + "; ".join([self._stopped, *parts])
        if WRONG in named or DIED in named:
            return 1, "; ".join(parts)
        if len(named.get(OK, [])) < len(self.steps):
            return 3, "; ".join([*parts, "run again to go on"])
        return 0, "; ".join(parts)


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def fresh(work: Path) -> None:
    """An empty work folder.

    Raises:
        ValueError: what is there is not an earlier run's.
    """
    if work.exists():
        if any(work.iterdir()) and not (work / files.SUMMARY).exists():
            raise ValueError(f"--work: {work} holds other files, expected an earlier run's or none")
        shutil.rmtree(work)
    work.mkdir(parents=True)
