"""One case: build every provider, check it, count memory, time them interleaved, check again."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from bench import memory
from bench.cases import WHOLE, WHOLE_MODELS, Case
from bench.costmodel import Cost, cost, model_cost
from bench.data import CaseData
from bench.machine import Limits
from bench.model_providers import MODEL_PROVIDERS
from bench.providers import Prepared, Provider
from bench.timing import GRAPH_BELOW_SECONDS, Stopwatch, percentile, quiet_gc
from bench.verify import Verifier
from lora_kernels.dispatch.op import BackendError

OK, REFUSED, WRONG, FAILED = "ok", "refused", "wrong", "failed"
BASELINE, STEP_BASELINE = "dense", "peft"  # what `Row.ratio` is against
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How long and how carefully a case is timed.

    Attributes:
        seconds: time budget of one provider in one case; rounds stop when all budgets are spent.
        min_rounds, max_rounds: bounds on the samples of each provider.
        sample_seconds: a shorter call is repeated within a sample until it lasts so long. An
            untimed call comes before: the sample must not pay for the other provider's threads,
            which spin for a while after their work is done.
        rotate_bytes: size that the copies of the weight take together.
    """

    seconds: float = 1.5
    min_rounds: int = 7
    max_rounds: int = 200
    sample_seconds: float = 5e-3
    rotate_bytes: int = 1 << 30


@dataclass
class Row:
    """One provider in one case. Times in seconds, per call; None where there is none.

    Attributes:
        status: ok; refused (it says it cannot), failed (it raised), wrong (no time is taken).
        waited: whether the GPU waited for the host in any sample: such times hold the host's too.
        ratio: median over the rounds of this provider's time by the baseline's in the same round:
            the frozen dense linear; for a fine-tuning step, PEFT over the dense base.
        flops_per_s, bytes_per_s: the cost model's floors divided by the median time.
        of_gemm, of_bandwidth: these as parts of this machine's measured limits.
        floor: the least time that the cost model and the limits allow; over_floor = p50 / floor.
        peak_bytes: what one call takes above what was resident before it.
        saved_bytes: what autograd keeps between forward and backward, without parameters.
    """

    case: Case
    provider: str
    status: str = OK
    note: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 0
    graph: bool = False
    waited: bool = False
    ratio: float | None = None
    flops_per_s: float | None = None
    bytes_per_s: float | None = None
    of_gemm: float | None = None
    of_bandwidth: float | None = None
    floor: float | None = None
    over_floor: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    samples: list[float] = field(default_factory=list, repr=False)

    def as_dict(self, *, samples: bool = False) -> dict[str, Any]:
        own = {k: v for k, v in asdict(self).items() if k not in ("case", "samples")}
        row = {**self.case.as_dict(), **own}
        return {**row, "samples": self.samples} if samples else row


@dataclass
class _Entry:
    row: Row
    provider: Provider
    prepared: Prepared
    call: Callable[[int], object]
    repeats: int = 1
    turn: int = 0
    fresh: bool = False  # every call writes into pages that are not there yet


def run_case(
    case: Case,
    providers: Iterable[Provider],
    device: torch.device,
    settings: Settings,
    limits: Limits | None,
    *,
    verify_only: bool = False,
) -> list[Row]:
    """All providers of one case, in the order given; those that do not do the op are left out."""
    data = CaseData(case, device, settings.rotate_bytes)
    verifier = Verifier(data)
    rows: list[Row] = []
    entries: list[_Entry] = []
    for provider in providers:
        if case.op not in provider.ops:
            continue
        row = Row(case, provider.name)
        rows.append(row)
        reason = provider.refusal(case, device)
        if reason is not None:
            row.status, row.note = REFUSED, reason
            continue
        entry = _prepare(provider, row, data, verifier)
        if entry is not None:
            entries.append(entry)
    if not verify_only:
        for entry in entries:
            entry.fresh = case.fresh and device.type == "cpu"
            with _errors_in(entry.row):
                _count_memory(entry, device)
        entries = [entry for entry in entries if entry.row.status == OK]
        if entries:
            _time(entries, Stopwatch.on(device), settings)
        for entry in entries:
            _recheck(entry, verifier)
            derive(entry.row, limits)
        _relate(rows)
    del entries, data, verifier
    gc.collect()
    return rows


def _prepare(provider: Provider, row: Row, data: CaseData, verifier: Verifier) -> _Entry | None:
    with _errors_in(row):
        prepared = provider.build(data)
        verdict = verifier.check(provider, prepared)
        row.note = verdict.note
        if verdict.ok:
            return _Entry(row, provider, prepared, prepared.call)
        row.status = WRONG
    return None


@contextmanager
def _errors_in(row: Row) -> Iterator[None]:
    """Whatever a provider raises is its row's result, not the end of the run."""
    try:
        yield
    except BackendError as error:
        row.status, row.note = REFUSED, refusal(error)
    except Exception as error:
        row.status, row.note = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]


def refusal(error: BackendError) -> str:
    """The refusal of the backend that was asked for, out of the whole explanation."""
    lines = str(error).splitlines()
    head = lines[0]
    asked = head.rsplit("(", 1)[-1].split(" ", 1)[0]
    own = (line.split(None, 1) for line in lines[1:])
    return next((reason for backend, reason in own if backend == asked), head)


def _count_memory(entry: _Entry, device: torch.device) -> None:
    prepared = entry.prepared
    if prepared.forward is not None:
        forward = prepared.forward
        with prepared.context():
            entry.row.saved_bytes = memory.saved_for_backward(
                lambda: forward(0), prepared.parameters
            )
    with prepared.context(), torch.set_grad_enabled(prepared.grad):
        prepared.call(0)
        entry.row.peak_bytes = memory.peak_extra(lambda: prepared.call(0), device)


def _time(entries: list[_Entry], stopwatch: Stopwatch, settings: Settings) -> None:
    for entry in entries:
        _warm_up(entry, stopwatch, settings)
    spent = 0.0
    rounds = 0
    with quiet_gc():
        while rounds < settings.min_rounds or (
            rounds < settings.max_rounds and spent < settings.seconds * len(entries)
        ):
            start = time.perf_counter()
            for entry in rotated(entries, rounds):
                entry.row.samples.append(_sample(entry, stopwatch))
                entry.row.waited |= stopwatch.waited
            spent += time.perf_counter() - start
            rounds += 1


def rotated(entries: list[T], turn: int) -> list[T]:
    """Rotated by one each round and turned around every other one, so that neither the place in
    the round nor the neighbour before is always the same."""
    if not entries:
        return []
    shift = turn % len(entries)
    order = entries[shift:] + entries[:shift]
    return order[::-1] if turn % 2 else order


def _warm_up(entry: _Entry, stopwatch: Stopwatch, settings: Settings) -> None:
    """Run until the time of a call is known; capture short CUDA calls; choose the repeats: one
    where memory must be fresh, as a second call would get what the first one gave back."""
    times = [_sample(entry, stopwatch) for _ in range(3)]
    seconds = min(times)
    if seconds < GRAPH_BELOW_SECONDS:
        with entry.prepared.context(), torch.set_grad_enabled(entry.prepared.grad):
            graphs = [
                stopwatch.capture(lambda i=i: entry.prepared.call(i))  # type: ignore[misc]
                for i in range(min(entry.prepared.copies, 8))
            ]
        replays = [g for g in graphs if g is not None]
        if len(replays) == len(graphs):
            entry.call = lambda i: replays[i % len(replays)]()
            entry.row.graph = True
            return
    if stopwatch.repeats and not entry.fresh:
        entry.repeats = max(1, min(1000, round(settings.sample_seconds / max(seconds, 1e-9))))


def _sample(entry: _Entry, stopwatch: Stopwatch) -> float:
    call, first = entry.call, entry.turn
    entry.turn += entry.repeats
    prepared = entry.prepared
    if entry.fresh:
        memory.release_freed()
    with prepared.context(), torch.set_grad_enabled(prepared.grad):
        if entry.repeats == 1:
            return stopwatch.time(lambda: call(first))

        def several() -> None:
            for i in range(first, first + entry.repeats):
                call(i)

        call(entry.turn)
        entry.turn += 1
        return stopwatch.time(several) / entry.repeats


def _recheck(entry: _Entry, verifier: Verifier) -> None:
    """A result that has gone wrong since, such as a weight overwritten, takes the time back."""
    verdict = verifier.check(entry.provider, entry.prepared)
    if not verdict.ok:
        entry.row.status = WRONG
        entry.row.note = f"after timing: {verdict.note}"
        entry.row.samples = []


def derive(row: Row, limits: Limits | None) -> None:
    """Fill in the percentiles, the speeds and, against the limits, the shares of them."""
    if not row.samples:
        return
    row.rounds = len(row.samples)
    row.p20, row.p50, row.p80 = (percentile(row.samples, q) for q in (0.2, 0.5, 0.8))
    floors = _floors(row)
    if floors is None:
        return
    row.flops_per_s = floors.flops / row.p50
    row.bytes_per_s = floors.bytes / row.p50
    if limits is not None:
        gemm = limits.gemm[row.case.dtype]
        row.floor = floors.seconds(gemm, limits.read, limits.copy)
        row.over_floor = row.p50 / row.floor
        row.of_gemm = row.flops_per_s / gemm
        row.of_bandwidth = row.bytes_per_s / limits.read


def _floors(row: Row) -> Cost | None:
    """None of a step whose layer only names a model."""
    if row.case.op not in WHOLE:
        return cost(row.case)
    provider = MODEL_PROVIDERS.get(row.provider)
    if row.case.layer not in WHOLE_MODELS or provider is None:
        return None
    return model_cost(row.case, provider.quantised, provider.adapted)


def baseline(case: Case) -> str:
    """The provider that the others' times are divided by."""
    return STEP_BASELINE if case.op == "step" else BASELINE


def _relate(rows: list[Row]) -> None:
    base = next((r for r in rows if r.provider == BASELINE and r.samples), None)
    for row in rows:
        if base is not None:
            row.ratio = paired_ratio(row.samples, base.samples)


def paired_ratio(ours: list[float], theirs: list[float]) -> float | None:
    """Median over the rounds of ours / theirs in the same round; None without samples.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    if not ours or not theirs:
        return None
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
