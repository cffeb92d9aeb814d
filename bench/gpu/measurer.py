"""Checks and times ways to run a LoRA op, for `gpu/tune.py`: each is forced through a table of one
entry, as the finished table will do it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES
from bench.runner import FAILED, OK, WRONG, Settings, rotated
from bench.timing import GRAPH_BELOW_SECONDS, Stopwatch, percentile, quiet_gc
from lora_kernels import use_backend
from lora_kernels.ops.common.configs import GemmConfig
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.strategies import choose, use_strategy
from lora_kernels.ops.common.tuned import Entry, Key, Table, use_table
from lora_kernels.testing import assert_within_budget
from tools.op_inputs.calls import double
from tools.op_inputs.layer import Layer, lora_backward_of, lora_forward
from tools.op_inputs.source import Source

OUTPUTS = {"lora_linear_fwd": ("y", "s"), "lora_linear_bwd": ("dx", "da", "db")}
BLOCK_SIZE = 64  # of a 4-bit weight
Shape = tuple[int, int, int, int]  # M, N, K, r


@dataclass(frozen=True)
class Point:
    """One call to tune: an op on a shape, over a dense W or a 4-bit one."""

    op: str
    shape: Shape
    dropout: float = 0.0
    quantised: bool = False
    dtype: str = "bf16"

    @property
    def problem(self) -> Problem:
        """As the kernels see it on contiguous tensors."""
        m, n, k, r = self.shape
        dtype = DTYPES[self.dtype]
        rows = [k] if self.op == "lora_linear_fwd" else [n]  # of x, or of dy
        rows += [] if self.quantised else [k]
        tma = all(row * dtype.itemsize % 16 == 0 for row in rows)
        return Problem(m, n, k, r, dtype, self.dropout > 0, tma, self.quantised)

    @property
    def key(self) -> Key:
        return Key.of(self.op, self.problem)

    def __str__(self) -> str:
        return f"{self.op} {self.problem}"


@dataclass(frozen=True)
class Candidate:
    """A way to run a point; `config` is None in addmm."""

    strategy: str
    config: GemmConfig | None

    def entry(self, seconds: float) -> Entry:
        return Entry(self.strategy, self.config, seconds)

    def __str__(self) -> str:
        return f"{self.strategy} {self.config or 'vendor GEMM'}"


@dataclass
class Timing:
    """A candidate's status as in `bench.runner`, and seconds of calls, one a round, where it is
    ok."""

    candidate: Candidate
    status: str = OK
    note: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def p50(self) -> float:
        return percentile(self.samples, 0.5) if self.samples else math.inf


@dataclass
class _Call:
    """A point's arguments, its exact outputs in fp64, and those of plain PyTorch in its dtype."""

    op: str
    args: list[Any]
    exact: list[Tensor]
    plain: list[Tensor]

    def run(self) -> list[Tensor]:
        return _run(self.op, self.args)

    def check(self, got: Sequence[Tensor]) -> None:
        """Raise AssertionError where an output is over the error budget."""
        for name, t, exact, plain in zip(
            OUTPUTS[self.op], got, self.exact, self.plain, strict=True
        ):
            assert_within_budget(t, exact, plain, name)


class Measurer:
    """A `tune.Measure`, on a device that Triton runs on.

    Args:
        settings: `seconds` are of each candidate. One copy of the weight is enough: the stopwatch
            flushes the cache.
    """

    def __init__(self, device: torch.device, settings: Settings) -> None:
        self.device = device
        self.settings = settings
        self.stopwatch = Stopwatch.on(device)
        self._last: tuple[Point, _Call] | None = None

    def __call__(self, point: Point, candidates: Sequence[Candidate]) -> list[Timing]:
        """Check every candidate, then time those that are right in the same rounds.

        A candidate that does not compile or run is one that failed, not the end of the run.
        """
        call = self._call(point)
        timings = [Timing(c) for c in candidates]
        tables = {c: self._table_of(point, c) for c in candidates}
        ready = []
        for timing in timings:
            with _errors_in(timing), _forced(tables[timing.candidate]):
                self._expect_chosen(point, timing.candidate)
                call.check(call.run())
                ready.append((timing, self._quick(call)))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # an error that every later call would repeat
        rounds, spent = 0, 0.0
        with quiet_gc():
            while ready and self._goes_on(rounds, spent, len(ready)):
                start = time.perf_counter()
                for timing, again in rotated(ready, rounds):
                    with _forced(tables[timing.candidate]):
                        timing.samples.append(self.stopwatch.time(again))
                spent += time.perf_counter() - start
                rounds += 1
        for timing, _ in ready:
            with _errors_in(timing), _forced(tables[timing.candidate]):
                call.check(call.run())
        return timings

    def _goes_on(self, rounds: int, spent: float, candidates: int) -> bool:
        s = self.settings
        within = rounds < s.max_rounds and spent < s.seconds * candidates
        return rounds < s.min_rounds or within

    def _quick(self, call: _Call) -> Callable[[], object]:
        """The call, or a graph of it where its launches would cost more than its work."""
        if min(self.stopwatch.time(call.run) for _ in range(3)) < GRAPH_BELOW_SECONDS:
            return self.stopwatch.capture(call.run) or call.run
        return call.run

    def _table_of(self, point: Point, candidate: Candidate) -> Table:
        gpu = planned_device(self.device).gpu or ""
        return Table(gpu, {point.key: candidate.entry(0.0)}, "bench tune")

    def _expect_chosen(self, point: Point, candidate: Candidate) -> None:
        plan = choose(point.op, point.problem, planned_device(self.device))
        if (plan.strategy, plan.config) != (candidate.strategy, candidate.config):
            raise RuntimeError(f"{plan.strategy} {plan.config} would run instead")

    def _call(self, point: Point) -> _Call:
        if self._last is None or self._last[0] != point:
            self._last = None  # first give back what the last one holds
            self._last = point, _prepare(point, self.device)
        return self._last[1]


@contextmanager
def _forced(table: Table) -> Iterator[None]:
    with use_backend("triton"), use_strategy(None), use_table(table):
        yield


@contextmanager
def _errors_in(timing: Timing) -> Iterator[None]:
    """What goes wrong is the candidate's result and takes its times back."""
    try:
        yield
    except AssertionError as error:
        timing.status, timing.note = WRONG, str(error).splitlines()[0]
        timing.samples = []
    except Exception as error:  # compilers and drivers raise all kinds
        timing.status, timing.note = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        timing.samples = []


def _prepare(point: Point, device: torch.device) -> _Call:
    """Seeded inputs whose outputs are near 1, and what they should give."""
    p, source = point.problem, Source(device=device)
    layer = Layer(point.shape, p.dtype, dropout=point.dropout)
    dense = list(lora_forward(layer, source))
    given = list(dense)
    with use_backend("reference"):
        if p.quantised:
            q = source.quantised(dense[1][0], (BLOCK_SIZE, True, "nf4"))
            given[1], given[2] = q.base, q.meta
            # The weight's rounding belongs to the format, not to a kernel's error.
            dense[1] = [q.dequantize(p.dtype)]
        if point.op == "lora_linear_bwd":
            s, dy = _run("lora_linear_fwd", dense)[1], layer.dy(source)
            given, dense = (list(lora_backward_of(a, dy, s, layer)) for a in (given, dense))
        plain, exact = _run(point.op, dense), _run(point.op, double(dense))
    return _Call(point.op, given, exact, plain)


def _run(op: str, args: list[Any]) -> list[Tensor]:
    outputs = getattr(torch.ops.lora_kernels, op)(*args)
    return list(outputs[: len(OUTPUTS[op])])
