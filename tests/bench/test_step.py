"""The fine-tuning step on a tiny random model: processes, verdicts, failures."""

from __future__ import annotations

import pytest
import torch

from bench.cases import BOTH, Case
from bench.runner import FAILED, OK
from bench.step import judge, run_model

CPU = torch.device("cpu")
TINY = Case("step", "tiny-llama", 32, BOTH, 8, 0.05, adapter_dtype="fp32")


@pytest.mark.slow
def test_all_providers_on_a_tiny_model() -> None:
    rows = run_model(TINY, CPU, ".", rounds=2)
    assert {r.provider: (r.status, r.note) for r in rows if r.status != OK} == {}
    for row in rows:
        assert len(row.samples) == row.rounds == 2
        assert row.peak_bytes is None or row.peak_bytes > 0
        assert "tokens/s, loss" in row.note
    assert next(r for r in rows if r.provider == "peft").ratio == 1.0


@pytest.mark.slow
def test_a_worker_that_cannot_load_is_reported() -> None:
    (row,) = run_model(TINY, CPU, "peft$", rounds=1, model="/no/such/model.gguf")
    assert row.status == FAILED
    assert "no/such/model.gguf" in row.note
    assert row.p50 is None


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ({"ours": [5.0, 4.0], "peft+bnb": [5.01, 4.0]}, None),
        ({"ours": [5.0, 4.0]}, None),
        ({"ours": [5.0, float("nan")], "peft+bnb": [5.0, 4.0]}, "losses"),
        ({"ours": [5.0, 5.0], "peft+bnb": [5.0, 4.0]}, "does not fall"),
        ({"ours": [6.0, 4.0], "peft+bnb": [5.0, 4.0]}, "first loss 6.0"),
        ({"ours": [5.0, 4.9], "peft+bnb": [5.0, 4.0]}, "learns 0.1"),
    ],
)
def test_verdicts(losses: dict[str, list[float]], says: str | None) -> None:
    reason = judge("ours", losses)
    assert reason is None if says is None else reason is not None and says in reason
