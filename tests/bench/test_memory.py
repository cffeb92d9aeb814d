"""Bytes kept, bytes at the peak, and fresh pages for what writes a whole weight."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import memory
from bench.cases import BOTH, Case
from bench.costmodel import saved_bytes
from bench.data import CaseData
from bench.memory import peak_extra, release_freed, resident_bytes, saved_for_backward
from bench.providers import PROVIDERS, Outputs, Prepared, Provider
from bench.runner import Settings, run_case
from bench.timing import Stopwatch
from lora_kernels.dispatch import native
from lora_kernels.dispatch.op import BackendError

CPU = torch.device("cpu")
OURS = {p.name: p for p in PROVIDERS if p.ours}


def test_saved_bytes_count_a_storage_once_and_no_parameter() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    w = torch.randn(4, 16, requires_grad=True)
    assert saved_for_backward(lambda: x @ w.T, [w]) == 8 * 16 * 4
    assert saved_for_backward(lambda: (x * x) @ w.T, [x, w]) == 8 * 16 * 4
    assert saved_for_backward(lambda: x @ w.T, [x, w]) == 0


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
def test_peak_sees_what_is_freed_again() -> None:
    size = 64 << 20
    peak = peak_extra(lambda: torch.ones(size // 4).sum(), torch.device("cpu"))
    assert peak is not None
    assert 0.9 * size < peak < 1.5 * size


def test_saved_bytes_look_into_a_wrapper() -> None:
    """A tensor without storage of its own, such as torchao's NF4 tensor, counts by its parts."""
    from torch.testing._internal.two_tensor import TwoTensor

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(kept)
            return x.clone()

    x = torch.randn(3, requires_grad=True)
    pair = TwoTensor(torch.randn(8), torch.randn(8))
    assert saved_for_backward(lambda: Keep.apply(x, pair), []) == 2 * 8 * 4
    assert saved_for_backward(lambda: Keep.apply(x, pair), [pair.a]) == 8 * 4
    assert saved_for_backward(lambda: Keep.apply(x, pair), [pair]) == 0


@pytest.mark.parametrize("adapter", ["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("op", ["lora_linear", "nf4_lora_linear"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_ours_save_x_and_s_only(backend: str, op: str, dropout: float, adapter: str) -> None:
    if backend == "native" and not native.available():
        pytest.skip(f"needs the extension: {native.why_unavailable()}")
    case = Case(op, "tiny", 40, BOTH, 8, dropout, adapter_dtype=adapter)
    prepared = OURS[f"ours:{backend}"].build(CaseData(case, CPU, 1))
    forward = prepared.forward
    assert forward is not None
    with prepared.context():
        kept = saved_for_backward(lambda: forward(0), prepared.parameters)
    assert kept == saved_bytes(case)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names,
    reason="needs glibc, whose malloc can be told to give memory back",
)
def test_freed_memory_goes_back_to_the_system() -> None:
    # Each too small for a mapping of its own; the last one keeps the end of the heap in use.
    pieces = [torch.ones(24 << 10) for _ in range(400)]
    size = sum(p.nbytes for p in pieces[:-1])
    del pieces[:-1]
    before = resident_bytes()
    release_freed()
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert before[0] - after[0] > 0.8 * size


@pytest.mark.parametrize(
    ("error", "status", "note"),
    [
        (MemoryError("no room\nfor it"), "failed", "MemoryError: no room"),
        (BackendError("op: no backend\n  reference takes no more"), "refused", "op: no backend"),
    ],
)
def test_an_error_while_memory_is_counted_is_its_rows_result(
    error: Exception, status: str, note: str
) -> None:
    inner = OURS["ours:reference"]

    def failing(data: CaseData) -> Prepared:
        prepared = inner.build(data)

        def forward(i: int) -> Outputs:
            raise error

        prepared.forward = forward  # called for the bytes it saves, and for nothing else
        return prepared

    providers = [Provider("fails", inner.ops, failing), inner]
    settings = Settings(seconds=1e-9, min_rounds=1, max_rounds=1, rotate_bytes=1)
    first, second = run_case(
        Case("lora_linear", "tiny", 4, BOTH, 8), providers, CPU, settings, None
    )
    assert (first.status, first.note, first.samples) == (status, note, [])
    assert (second.status, second.rounds) == ("ok", 1)


class Recorded(Stopwatch):
    """Writes down when a timed region begins and ends."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def time(self, call: Callable[[], object]) -> float:
        self.events.append("start")
        call()
        self.events.append("stop")
        return 1e-6  # so short that it would be repeated


@pytest.mark.parametrize("op", ["nf4_quantize", "nf4_dequantize", "nf4_linear"])
def test_codecs_are_timed_one_call_at_a_time_into_fresh_memory(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(memory, "release_freed", lambda: events.append("release"))
    monkeypatch.setattr(Stopwatch, "on", lambda device: Recorded(events))
    inner = OURS["ours:reference"]

    def recorded(data: CaseData) -> Prepared:
        prepared = inner.build(data)
        call = prepared.call

        def wrapped(i: int) -> Outputs:
            events.append("call")
            return call(i)

        prepared.call = wrapped
        return prepared

    providers = [Provider(name, inner.ops, recorded) for name in ("one", "another")]
    settings = Settings(seconds=1e-9, min_rounds=3, max_rounds=3, rotate_bytes=1)
    rows = run_case(Case(op, "tiny", 2 * (op == "nf4_linear")), providers, CPU, settings, None)
    assert [r.rounds for r in rows] == [3, 3]

    starts = [i for i, event in enumerate(events) if event == "start"]
    assert len(starts) == 2 * (3 + 3)  # warm-up and rounds
    for i in starts:
        calls = events.index("stop", i) - i - 1
        if op == "nf4_linear":
            assert events[i - 1] != "release"
        else:
            assert (events[i - 1], calls) == ("release", 1)
    last = starts[-1]
    assert (events.index("stop", last) - last - 1 > 1) == (op == "nf4_linear")
