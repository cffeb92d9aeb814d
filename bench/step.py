"""Whole models: every provider in a process of its own, one piece of work each in turn.

The work is a training step, the tokens that follow a prompt (`generate`) or a prompt (`prefill`).

Peak memory needs a process per provider: the peak of a shared one would be the greediest's. Times
are compared within a round all the same: the processes are alive together, and while one works the
others wait for a line on their standard input, which costs no CPU time. The order is rotated and
turned around as for layers. Nothing is shared, so nothing is warmed for a neighbour.

Verified before and after. What answers is held against the same weights in fp64
(`bench.model_check`). A step: with B = 0 the first loss is the base model's, so providers over the
same weights must agree on it to `LOSS_TOLERANCE` (bf16 arithmetic in another order), and the
warm-up steps on one batch must bring the loss down, ours by at least `PROGRESS` of the peer's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from bench.cases import WHOLE_MODELS, Case
from bench.costmodel import STEP_BATCH
from bench.model_check import verdict
from bench.model_providers import (
    MODEL_PROVIDERS,
    ModelProvider,
    ModelSpec,
    fuse_projections,
    scratch,
)
from bench.providers.peers import installed
from bench.runner import FAILED, REFUSED, WRONG, Row, baseline, paired_ratio, rotated
from bench.step_worker import ORACLE
from bench.timing import percentile

WARM_UP = 3
LEAST_ROUNDS = 3
LARGE = 10**8  # parameters of a head
UNASKED = ("ours", "peft+bnb", "peft")  # of suite `targets`, where no provider is named
LOSS_TOLERANCE = 0.01
PROGRESS = 0.7
# Ours, and the peer over the same weights that its losses are held against.
PAIRS = {
    **{f"ours{more}": "peft+bnb" for more in ("", "+fused")},
    **{f"ours-dense{more}": "peft" for more in ("", "+fused")},
}


@dataclass
class Process:
    """A worker and its row."""

    row: Row
    popen: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            RuntimeError: the worker answered with an error or died.
        """
        assert self.popen.stdin is not None and self.popen.stdout is not None
        try:
            self.popen.stdin.write(json.dumps(command) + "\n")
            self.popen.stdin.flush()
            line = self.popen.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"worker ended with status {self.popen.wait()}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer  # type: ignore[no-any-return]

    def end(self) -> None:
        """Let the worker end, and wait until its memory is free."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.close()
        try:
            self.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self.popen.stdout.close()


@dataclass
class _Run:
    """What the processes of a case share."""

    case: Case
    device: torch.device
    spec: ModelSpec
    folder: str
    stack: ExitStack
    tell: Callable[[str], None]
    python: str | None = None  # an interpreter with the peers that this one lacks
    oracle: Process | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)
    made: dict[tuple[object, ...], str] = field(default_factory=dict)  # the oracle's answers

    def start(self, row: Row, python: str | None = None) -> Process:
        """A process with its model loaded."""
        process = self.stack.enter_context(_start(row, python or sys.executable))
        process.ask(
            do="load",
            provider=row.provider,
            device=str(self.device),
            threads=torch.get_num_threads(),
            **asdict(self.spec),
        )
        return process


def run_model(
    case: Case,
    device: torch.device,
    pattern: str | None = None,
    *,
    rounds: int = 9,
    seconds: float = 120.0,
    verify_only: bool = False,
    model: str | None = None,
    python: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time the whole model of `case`.

    Args:
        pattern: regular expression over provider names, matched from the start; None takes all
            that run unasked.
        rounds: timed pieces of each provider; no new round starts after `seconds`, but for 3.
        model: another model than the case's, as `ModelSpec.model`.
        python: an interpreter for the providers whose packages are not installed here.
        tell: takes a line about each phase; loading and warming up takes a minute or more.
    """
    named = case.layer in WHOLE_MODELS  # else a layer that only names the demo's model
    spec = ModelSpec(
        op=case.op,
        model=model or (case.layer if named and case.layer != "smollm2-135m" else None),
        batch=STEP_BATCH,
        tokens=case.m // STEP_BATCH if case.op == "step" else case.m,
        r=case.r,
        alpha=int(case.scale * case.r),
        dropout=case.dropout,
        dtype=case.dtype,
    )
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run = _Run(case, device, spec, folder, stack, tell, python)
        try:
            if named:
                _share_weights(run)
        except RuntimeError as error:  # without the model nobody can begin
            return [
                Row(case, p.name, status=FAILED, note=str(error))
                for p in chosen(case, pattern, named)
            ]
        live = list(_loaded(run, rows, pattern, named))
        live = _warm_up(run, live)
        if not verify_only:
            _time(run, live, rounds, seconds)
            live = [p for p in live if case.op == "step" or _right(run, p, "after timing: ")]
        for process in live:
            process.row.note = _note(run, process.row)
    base = next((r for r in rows if r.provider == baseline(case) and r.samples), None)
    for row in rows:
        row.ratio = paired_ratio(row.samples, base.samples) if base and row.samples else None
    return rows


def chosen(case: Case, pattern: str | None, named: bool = True) -> list[ModelProvider]:
    """The providers of a case, in the order of the table."""

    def wanted(p: ModelProvider) -> bool:
        if pattern is not None:
            return re.match(pattern, p.name) is not None
        return p.unasked and not (p.heavy and large) if named else p.name in UNASKED

    model = WHOLE_MODELS.get(case.layer)
    large = model is not None and model.vocabulary * case.k > LARGE

    return [p for p in MODEL_PROVIDERS.values() if case.op in p.ops and wanted(p)]


def _share_weights(run: _Run) -> None:
    """Make the model once. Its process stays for as long as there are answers to check."""
    run.oracle = run.start(Row(run.case, ORACLE))
    path = scratch(run.folder, "weights.pt")
    run.oracle.ask(do="write", path=path)
    run.spec = replace(run.spec, weights=path)
    run.tell("the model is made")


def _loaded(run: _Run, rows: list[Row], pattern: str | None, named: bool) -> Iterator[Process]:
    providers = chosen(run.case, pattern, named)
    own = {p.name: Row(run.case, p.name) for p in providers}
    rows += own.values()
    # First those whose loading takes most, while there is room.
    for provider in sorted(providers, key=lambda p: not p.writes_files):
        row = own[provider.name]
        missing = [p for p in ("transformers", *provider.needs) if _absent(run, p)]
        if missing and (run.python is None or "transformers" in missing):
            row.status, row.note = REFUSED, f"{missing[0]} is not installed"
            continue
        if provider.fused and (reason := _no_fusion()):
            row.status, row.note = REFUSED, reason
            continue
        try:
            yield run.start(row, run.python if missing else None)
        except RuntimeError as error:
            row.status, row.note = FAILED, str(error)
            continue
        run.tell(f"{provider.name}: loaded")


def _absent(run: _Run, package: str) -> bool:
    return installed(package)(run.case, run.device) is not None


def _no_fusion() -> str | None:
    try:
        fuse_projections()
    except ValueError as error:
        return str(error)
    return None


@contextmanager
def _start(row: Row, python: str) -> Iterator[Process]:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryFile("w+") as errors:
        popen = subprocess.Popen(
            [python, "-m", "bench.step_worker"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        process = Process(row, popen, errors)
        try:
            yield process
        finally:
            process.end()


def _warm_up(run: _Run, live: list[Process]) -> list[Process]:
    """Those that work and answer right; the others are marked."""
    ready = []
    for process in live:
        try:
            if run.case.op != "step" and not _right(run, process):
                continue
            answers = [process.ask(do="step") for _ in range(WARM_UP)]
        except RuntimeError as error:
            process.row.status, process.row.note = FAILED, str(error)
            continue
        run.losses[process.row.provider] = [a["loss"] for a in answers if "loss" in a]
        run.tell(f"{process.row.provider}: {answers[-1]['seconds']:.2f} s a piece")
        ready.append(process)
    if run.oracle is not None:
        run.oracle.end()
        run.oracle = None
    if run.case.op != "step":
        return ready
    for process in ready:
        reason = judge(process.row.provider, run.losses)
        if reason is not None:
            process.row.status, process.row.note = WRONG, reason
    return [p for p in ready if p.row.status != WRONG]


def _right(run: _Run, process: Process, when: str = "") -> bool:
    """Whether what the provider answers is right; its row says what is not."""
    provider, row = MODEL_PROVIDERS[process.row.provider], process.row
    got = scratch(run.folder, "got.pt")
    answer = process.ask(do="check", path=got)
    weights = answer.get("weights")
    asked = {
        "tokens": answer["tokens"],
        "first": answer["first"],
        "quantised": provider.quantised and weights is None,
        "adapted": provider.adapted,
        "weights": weights,
    }
    key = tuple(map(str, asked.values()))
    if key not in run.made:
        if run.oracle is None:
            row.status, row.note = WRONG, f"{when}answers otherwise than before"
            row.samples = []
            return False
        path = scratch(run.folder, f"exact-{len(run.made)}.pt")
        run.oracle.ask(do="exact", path=path, **asked)
        run.made[key] = path
    found = verdict(provider, Path(got), Path(run.made[key]))
    if not found.ok:
        row.status, row.note, row.samples = WRONG, when + found.note, []
    return found.ok


def judge(provider: str, losses: dict[str, list[float]]) -> str | None:
    """What is wrong with a provider's warm-up losses, or None."""
    own = losses[provider]
    if not all(0 < loss < float("inf") for loss in own):
        return f"losses {own}"
    if not MODEL_PROVIDERS[provider].adapted:
        return None  # nothing learns
    if own[-1] >= own[0]:
        return f"the loss does not fall on one batch: {own[0]:.4f} -> {own[-1]:.4f}"
    peer = PAIRS.get(provider)
    if peer is None or peer not in losses:
        return None
    theirs = losses[peer]
    if abs(own[0] - theirs[0]) > LOSS_TOLERANCE * theirs[0]:
        return f"first loss {own[0]:.4f}, {peer} has {theirs[0]:.4f}"
    if own[0] - own[-1] < PROGRESS * (theirs[0] - theirs[-1]):
        return f"learns {own[0] - own[-1]:.4f}, {peer} {theirs[0] - theirs[-1]:.4f}"
    return None


def _time(run: _Run, live: list[Process], rounds: int, seconds: float) -> None:
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.monotonic() - start > seconds:
            break
        for process in rotated(list(live), turn):
            try:
                answer = process.ask(do="step")
            except RuntimeError as error:
                row = process.row
                row.status, row.note, row.samples = FAILED, str(error), []
                live.remove(process)
                continue
            process.row.samples.append(answer["seconds"])
            if "loss" in answer:
                run.losses[process.row.provider].append(answer["loss"])
        run.tell(f"round {turn + 1} of {rounds}")
    for process in live:
        row = process.row
        row.peak_bytes = process.ask(do="memory")["peak_bytes"]
        row.rounds = len(row.samples)
        row.p20, row.p50, row.p80 = (percentile(row.samples, q) for q in (0.2, 0.5, 0.8))


def _note(run: _Run, row: Row) -> str:
    trail = run.losses[row.provider]
    notes = [f"{row.case.m / row.p50:.3g} tokens/s"] if row.p50 else []
    if trail:
        notes.append(f"loss {trail[0]:.3f} -> {trail[-1]:.3f} in {len(trail)} steps")
    return ", ".join(notes)
