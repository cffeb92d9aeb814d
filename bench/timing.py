"""Stopwatches: wall clock on a CPU; events, a flushed L2 cache and graphs on CUDA."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# A CUDA call shorter than this is captured in a graph: its launches would cost more than its work.
GRAPH_BELOW_SECONDS = 100e-6


class Stopwatch:
    """Times one call at a time on a CPU.

    `repeats` tells whether a short call may be repeated within a sample.
    """

    repeats = True

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
    """Times one call between two events, after a write over more than the L2 cache."""

    repeats = False  # from the second call on the cache would not be flushed

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 64 << 20), dtype=torch.uint8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def time(self, call: Callable[[], object]) -> float:
        self._flush.zero_()
        # The flush also keeps the GPU busy while the host launches: events see the GPU's time only.
        self._start.record()
        call()
        self._stop.record()
        self._stop.synchronize()
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
            return None
        return graph.replay


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
