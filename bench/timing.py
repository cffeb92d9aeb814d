"""Stopwatches: wall clock on a CPU; on CUDA events, with the host ahead of them, and graphs."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# A CUDA call shorter than this is captured in a graph, as whoever makes such calls would do: even
# queued up, launches stand a microsecond or two apart.
GRAPH_BELOW_SECONDS = 100e-6
# Clock cycles that the GPU sleeps while the host queues a call: at first, and at most (some 50 ms).
SLEEP_CYCLES, MOST_SLEEP_CYCLES = 200_000, 100_000_000


class Stopwatch:
    """Times one call at a time on a CPU.

    `repeats` tells whether a short call may be repeated within a sample. `waited` tells whether
    the device had to wait for the host during the last call, whose time then holds the host's too.
    """

    repeats = True
    waited = False

    @staticmethod
    def on(device: torch.device) -> Stopwatch:
        return CudaStopwatch(device) if device.type == "cuda" else Stopwatch()

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that one call takes, the release of what it returns included."""
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) * 1e-9

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """The call as a CUDA graph; None where there is no such thing."""
        return None


class CudaStopwatch(Stopwatch):
    """Times one call between two events, after a write over more than the L2 cache.

    The GPU sleeps before the first event, so that the host has queued the whole call before any of
    it runs: the events see the GPU's time only. Whether it was long enough is asked each time; one
    that was not, twice in a row, is doubled (once may be a compiler's or an allocator's doing). A
    call that waits for the GPU itself can never be ahead of it: its time is taken all the same, and
    `waited` says so.
    """

    repeats = False  # from the second call on the cache would not be flushed

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 64 << 20), dtype=torch.uint8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)
        self._sleep: Callable[[int], None] = torch.cuda._sleep
        self._cycles = SLEEP_CYCLES

    def time(self, call: Callable[[], object]) -> float:
        for attempt in itertools.count():
            self._flush.zero_()
            self._sleep(self._cycles)
            self._start.record()
            call()
            self._stop.record()
            self.waited = self._start.query()  # it has woken: the host was too late
            self._stop.synchronize()
            if not self.waited or (attempt and self._cycles >= MOST_SLEEP_CYCLES):
                break
            if attempt:
                self._cycles = min(2 * self._cycles, MOST_SLEEP_CYCLES)
        return self._start.elapsed_time(self._stop) * 1e-3

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        """Capture one call after the usual side-stream warm-up; None where it cannot be captured.

        The outputs live in the graph's own pool, so a replay overwrites them.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            _mend_generator(self.device)
            return None
        return graph.replay


def _mend_generator(device: torch.device) -> None:
    """A capture that broke off leaves the default generator in the state of one that is captured,
    in which it refuses to draw: give it a new one with the same seed."""
    index = torch.cuda.current_device() if device.index is None else device.index
    default = torch.cuda.default_generators[index]
    fresh = torch.Generator(device).manual_seed(default.initial_seed())
    default.graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Keep the cyclic collector out of a timed region."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def percentile(values: list[float], q: float) -> float:
    """The q-quantile (0..1) with linear interpolation.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: got none, expected at least one")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
