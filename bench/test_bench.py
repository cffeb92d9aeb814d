"""The same cases and providers under pytest-benchmark.

    pytest bench --benchmark-enable                                  # tiny cases
    LORA_KERNELS_BENCH_SUITE=quick pytest bench --benchmark-enable   # any suite of bench/suites.py
    LORA_KERNELS_BENCH_DEVICE=cuda ...

Without --benchmark-enable each one runs once, checked, untimed. Results are verified first here
too. `python -m bench run` is the better comparison: it interleaves the providers.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, step
from bench.__main__ import main
from bench.cases import WHOLE, Case
from bench.data import CaseData
from bench.providers import Provider, select
from bench.runner import OK, REFUSED, Row, refusal
from bench.step_worker import Server
from bench.suites import kind, suite
from bench.verify import Verifier
from lora_kernels.dispatch.op import BackendError

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


class Here:
    """Stands for `bench.step.Process`: the same commands and answers without a process."""

    def __init__(self, row: Row) -> None:
        self.row, self.server = row, Server()

    def ask(self, **command: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(
                json.dumps(self.server.answer(json.loads(json.dumps(command))))
            )
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return answer

    def end(self) -> None:
        del self.server


@pytest.mark.slow
def test_suite_models_on_tiny_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and whole models, every provider that is installed but that one compiled model stands
    for three, and goes through the compiler's front end alone."""

    @contextmanager
    def here(row: Row, python: str) -> Iterator[Here]:
        yield Here(row)

    compiler = torch.compile
    monkeypatch.setattr(step, "_start", here)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="eager"))
    output = str(tmp_path / "models")
    args = ["run", "--suite", "models-tiny", "--rotate-mib", "1", "--seconds", "0.01"]
    names = "ours:layer|(ours|ours-dense|dense|unsloth)$|ours-dense.compile|bnb|peft|llama"
    args += ["--rounds", "2", "--providers", names]
    assert main([*args, "--output", output]) == 0
    rows = report.load(tmp_path / "models.json")["rows"]
    named = [c.name for c in suite("models-tiny")]
    assert list(dict.fromkeys(r["case"] for r in rows)) == named
    for row in rows:
        name = f"{row['case']}: {row['provider']}: {row['note']}"
        assert row["status"] == OK or "is not installed" in row["note"], name
        assert (row["status"] == REFUSED) == (row["p50"] is None), name
        if row["op"] in WHOLE and row["status"] == OK:
            assert "tokens/s" in row["note"]
            assert row["over_floor"] > 0
    ours = {(r["op"], r["provider"]) for r in rows if r["status"] == OK and "ours" in r["provider"]}
    assert {o for o, p in ours if p == "ours:layer"} == {
        *("lora_linear", "nf4_lora_linear", "lora_packed", "nf4_lora_packed")
    }
    assert {o for o, p in ours if p == "ours"} == set(WHOLE)
    assert ("generate", "ours-dense+compile") in ours
    assert main([*args, "--output", output, "--resume"]) == 0  # nothing is left to do
