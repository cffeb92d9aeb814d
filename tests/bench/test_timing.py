"""The CUDA stopwatch on a made-up GPU: whose time does it take?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.timing import MOST_SLEEP_CYCLES, SLEEP_CYCLES, CudaStopwatch

CYCLES_PER_SECOND = 2e9


class Gpu:
    """A host clock, and the time until which the device is busy with what is queued."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.sleeps: list[int] = []

    def launch(self, host: float, device: float) -> None:
        """A call that keeps the host, then the device, for so many seconds."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.launch(0.0, cycles / CYCLES_PER_SECOND)

    def zero_(self) -> None:
        self.launch(1e-6, 50e-6)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.device, self.gpu.host)

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def stopwatch(gpu: Gpu) -> CudaStopwatch:
    made = CudaStopwatch.__new__(CudaStopwatch)
    made._flush, made._sleep, made._cycles = gpu, gpu.sleep, SLEEP_CYCLES  # type: ignore[assignment]
    made._start, made._stop = Event(gpu), Event(gpu)  # type: ignore[assignment]
    return made


def launches(gpu: Gpu, count: int, host: float, device: float) -> Callable[[], None]:
    def call() -> None:
        for _ in range(count):
            gpu.launch(host, device)

    return call


def test_the_hosts_time_is_not_in_it(gpu: Gpu, stopwatch: CudaStopwatch) -> None:
    call = launches(gpu, 10, host=40e-6, device=5e-6)  # 400 µs of the host, 50 of the device
    for _ in range(3):
        assert stopwatch.time(call) == pytest.approx(50e-6)
        assert not stopwatch.waited
    assert len(set(gpu.sleeps[-3:])) == 1  # a sleep that was long enough stays as it is


def test_a_long_call_needs_no_longer_sleep(gpu: Gpu, stopwatch: CudaStopwatch) -> None:
    assert stopwatch.time(launches(gpu, 3, 10e-6, 2e-3)) == pytest.approx(6e-3)
    assert gpu.sleeps == [SLEEP_CYCLES]


def test_what_happens_once_lengthens_nothing(gpu: Gpu, stopwatch: CudaStopwatch) -> None:
    compiles = iter([2.0])

    def call() -> None:
        gpu.launch(next(compiles, 1e-6), 5e-6)

    assert stopwatch.time(call) == pytest.approx(5e-6)
    assert gpu.sleeps == [SLEEP_CYCLES] * 2


def test_a_call_that_waits_for_the_device_says_so(gpu: Gpu, stopwatch: CudaStopwatch) -> None:
    def call() -> None:
        gpu.launch(1e-6, 5e-6)
        gpu.wait()
        gpu.launch(100e-6, 5e-6)

    seconds = stopwatch.time(call)
    assert stopwatch.waited and seconds == pytest.approx(110e-6)
    assert gpu.sleeps[-1] == MOST_SLEEP_CYCLES
    assert not stopwatch.time(launches(gpu, 1, 1e-6, 5e-6)) or not stopwatch.waited
