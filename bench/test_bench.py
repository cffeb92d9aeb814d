"""The same cases and providers under pytest-benchmark.

    pytest bench --benchmark-enable                                  # tiny cases
    LORA_KERNELS_BENCH_SUITE=quick pytest bench --benchmark-enable   # any suite of bench/suites.py
    LORA_KERNELS_BENCH_DEVICE=cuda ...

Without --benchmark-enable each one runs once, checked, untimed. Results are verified first here
too. `python -m bench run` is the better comparison: it interleaves the providers.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.data import CaseData
from bench.providers import Provider, select
from bench.runner import refusal
from bench.suites import kind, suite
from bench.verify import Verifier
from lora_kernels.dispatch.registry import BackendError

SUITE = os.environ.get("LORA_KERNELS_BENCH_SUITE", "smoke")
DEVICE = torch.device(os.environ.get("LORA_KERNELS_BENCH_DEVICE", "cpu"))
ROTATE_BYTES = 1 if SUITE == "smoke" else 1 << 30


def _pairs() -> list[Any]:
    return [
        pytest.param(case, provider, id=f"{case.name}-{provider.name}")
        for case in suite(SUITE)
        for provider in select(kind=kind(SUITE))
        if provider.refusal(case, DEVICE) is None
    ]


@functools.lru_cache(maxsize=1)
def _data(case: Case) -> tuple[CaseData, Verifier]:
    data = CaseData(case, DEVICE, ROTATE_BYTES)
    return data, Verifier(data)


@pytest.mark.parametrize(("case", "provider"), _pairs())
def test_case(benchmark: Any, case: Case, provider: Provider) -> None:
    data, verifier = _data(case)
    prepared = provider.build(data)
    try:
        verdict = verifier.check(provider, prepared)
    except BackendError as error:
        pytest.skip(f"{provider.name}: {refusal(error)}")
    assert verdict.ok, verdict.note
    turn = iter(range(1 << 62))
    with prepared.context(), torch.set_grad_enabled(prepared.grad):
        benchmark(lambda: prepared.call(next(turn)))
