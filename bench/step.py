"""The fine-tuning step: every provider in a process of its own, one step each in turn.

Peak memory needs a process per provider: the peak of a shared one would be the greediest's. Times
are compared within a round all the same: the processes are alive together, and while one runs a
step the others wait for a line on their standard input, which costs no CPU time. The order is
rotated and turned around as for layers. Nothing is shared, so nothing is warmed for a neighbour.

Verified before and after: with B = 0 the first loss is the base model's, so providers over the
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from bench.cases import Case
from bench.providers.peers import installed
from bench.runner import FAILED, REFUSED, STEP_BASELINE, WRONG, Row, paired_ratio, rotated
from bench.step_worker import PROVIDERS, StepSpec
from bench.timing import percentile

BATCH = 4
WARM_UP = 3
UNASKED = ("ours", "peft+bnb", "peft")  # what runs when no provider is named
LOSS_TOLERANCE = 0.01
PROGRESS = 0.7
# Ours, and the peer over the same weights that its losses are held against.
PAIRS = (("ours", "peft+bnb"), ("ours-dense", "peft"))


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
        return answer


def run_step(
    case: Case,
    device: torch.device,
    pattern: str | None = None,
    *,
    rounds: int = 9,
    seconds: float = 120.0,
    verify_only: bool = False,
    model: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time whole optimiser steps of `case`.

    Args:
        pattern: regular expression over provider names, matched from the start; None takes ours
            on the 4-bit base and both peers.
        rounds: timed steps of each provider; no new round starts after `seconds`, but for 3.
        model: another model than the demo's, as `StepSpec.model`.
        tell: takes a line about each phase; loading and warming up takes a minute or more.
    """
    spec = StepSpec(
        model=model,
        batch=BATCH,
        tokens=case.m // BATCH,
        r=case.r,
        alpha=int(case.scale * case.r),
        dropout=case.dropout,
        dtype=case.dtype,
    )
    rows: list[Row] = []
    with ExitStack() as stack:
        live: list[Process] = []
        for name in PROVIDERS:
            if not (name in UNASKED if pattern is None else re.match(pattern, name)):
                continue
            row = Row(case, name)
            rows.append(row)
            if reason := _refusal(name, case, device):
                row.status, row.note = REFUSED, reason
                continue
            process = stack.enter_context(_start(row))
            try:
                process.ask(
                    do="load",
                    provider=name,
                    device=str(device),
                    threads=torch.get_num_threads(),
                    **asdict(spec),
                )
            except RuntimeError as error:
                row.status, row.note = FAILED, str(error)
                continue
            live.append(process)
            tell(f"{name}: loaded")
        live, losses = _warm_up(live, tell)
        live = _verified(live, losses)
        if not verify_only:
            _time(live, rounds, seconds, losses, tell)
        for process in live:
            trail = losses[process.row.provider]
            rate = "" if verify_only else f"{_tokens_per_s(process.row):.0f} tokens/s, "
            process.row.note = f"{rate}loss {trail[0]:.3f} -> {trail[-1]:.3f} in {len(trail)} steps"
    base = next((r for r in rows if r.provider == STEP_BASELINE and r.samples), None)
    for row in rows:
        row.ratio = paired_ratio(row.samples, base.samples) if base and row.samples else None
    return rows


def _refusal(name: str, case: Case, device: torch.device) -> str | None:
    for package in ("transformers", *(("peft",) if "peft" in name else ())):
        if reason := installed(package)(case, device):
            return reason
    return installed("bitsandbytes")(case, device) if "bnb" in name else None


@contextmanager
def _start(row: Row) -> Iterator[Process]:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryFile("w+") as errors:
        popen = subprocess.Popen(
            [sys.executable, "-m", "bench.step_worker"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Process(row, popen, errors)
        finally:
            assert popen.stdin is not None and popen.stdout is not None
            popen.stdout.close()
            with suppress(BrokenPipeError):
                popen.stdin.close()
            try:
                popen.wait(timeout=10)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()


def _warm_up(
    live: list[Process], tell: Callable[[str], None]
) -> tuple[list[Process], dict[str, list[float]]]:
    losses: dict[str, list[float]] = {}
    ready = []
    for process in live:
        try:
            answers = [process.ask(do="step") for _ in range(WARM_UP)]
        except RuntimeError as error:
            process.row.status, process.row.note = FAILED, str(error)
        else:
            losses[process.row.provider] = [a["loss"] for a in answers]
            tell(f"{process.row.provider}: warm, {answers[-1]['seconds']:.2f} s a step")
            ready.append(process)
    return ready, losses


def _verified(live: list[Process], losses: dict[str, list[float]]) -> list[Process]:
    """Those whose losses are right; the others are marked wrong."""
    for process in live:
        reason = judge(process.row.provider, losses)
        if reason is not None:
            process.row.status, process.row.note = WRONG, reason
    return [p for p in live if p.row.status != WRONG]


def judge(provider: str, losses: dict[str, list[float]]) -> str | None:
    """What is wrong with a provider's warm-up losses, or None."""
    own = losses[provider]
    if not all(0 < loss < float("inf") for loss in own):
        return f"losses {own}"
    if own[-1] >= own[0]:
        return f"the loss does not fall on one batch: {own[0]:.4f} -> {own[-1]:.4f}"
    peer = dict(PAIRS).get(provider)
    if peer is None or peer not in losses:
        return None
    theirs = losses[peer]
    if abs(own[0] - theirs[0]) > LOSS_TOLERANCE * theirs[0]:
        return f"first loss {own[0]:.4f}, {peer} has {theirs[0]:.4f}"
    if own[0] - own[-1] < PROGRESS * (theirs[0] - theirs[-1]):
        return f"learns {own[0] - own[-1]:.4f}, {peer} {theirs[0] - theirs[-1]:.4f}"
    return None


def _time(
    live: list[Process],
    rounds: int,
    seconds: float,
    losses: dict[str, list[float]],
    tell: Callable[[str], None],
) -> None:
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - start > seconds:
            break
        for process in rotated(live, turn):
            answer = process.ask(do="step")
            process.row.samples.append(answer["seconds"])
            losses[process.row.provider].append(answer["loss"])
        tell(f"round {turn + 1} of {rounds}")
    for process in live:
        row = process.row
        row.peak_bytes = process.ask(do="memory")["peak_bytes"]
        row.rounds = len(row.samples)
        row.p20, row.p50, row.p80 = (percentile(row.samples, q) for q in (0.2, 0.5, 0.8))


def _tokens_per_s(row: Row) -> float:
    return row.case.m / row.p50 if row.p50 else 0.0
