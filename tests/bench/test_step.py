"""Whole models on a tiny random Llama: processes, verdicts, failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import BOTH, Case
from bench.llama_cpp import gguf_name, halves, interleaved, read_weights, write_model
from bench.model_check import Oracle, verdict
from bench.model_providers import MODEL_PROVIDERS, ModelSpec, load_model
from bench.runner import FAILED, OK, REFUSED, WRONG, Row
from bench.step import chosen, judge, run_model

CPU = torch.device("cpu")
TINY = Case("step", "tiny-llama", 32, BOTH, 8, 0.05, adapter_dtype="fp32")


@pytest.mark.slow
def test_all_providers_on_a_tiny_model() -> None:
    rows = run_model(TINY, CPU, "(ours|ours-dense|peft|peft.bnb)$", rounds=2)
    assert len(rows) == 4
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


def test_nothing_learns_without_adapters() -> None:
    assert judge("dense", {"dense": [5.0, 5.0]}) is None
    assert "losses" in str(judge("dense", {"dense": [5.0, float("inf")]}))


def test_who_runs_unasked() -> None:
    generate = Case("generate", "tiny-llama", 4, r=4, adapter_dtype="fp32")
    assert [p.name for p in chosen(TINY, None, named=False)] == ["ours", "peft", "peft+bnb"]
    names = {p.name for p in chosen(generate, None)}
    assert {"ours+compile", "unsloth", "llama.cpp-q4_0+lora"} <= names
    assert "ours+fused" not in names
    assert [p.name for p in chosen(generate, r"ours\+fused$")] == ["ours+fused"]
    large = {p.name for p in chosen(replace(generate, layer="llama-3.2-1b"), None)}
    assert {"ours", "dense", "llama.cpp-q4_0+lora"} <= large
    assert not large & {"ours+compile", "llama.cpp-bf16"}
    assert not {p.name for p in chosen(TINY, None)} & {"ours+compile", "llama.cpp-bf16"}


SPEC = ModelSpec(op="prefill", model="tiny-llama", tokens=12, r=4, alpha=8)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's answer for adapters on the dense base."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("oracle")
    oracle = Oracle(CPU, SPEC)
    oracle.write(str(folder / "weights.pt"))
    oracle.exact(str(folder / "exact.pt"), list(range(12)), 4, quantised=False, adapted=True)
    return folder / "exact.pt"


@pytest.mark.parametrize("name", ["ours-dense", "peft"])
def test_logits_are_held_against_fp64(name: str, exact: Path, tmp_path: Path) -> None:
    got, right = tmp_path / "got.pt", torch.load(exact)
    assert right["oracle"].dtype == torch.float64
    assert right["oracle"].shape == (8, 256)
    torch.save(right["plain"], got)
    assert verdict(MODEL_PROVIDERS[name], got, exact).ok
    torch.save(right["plain"] * 1.1, got)
    assert "logits: " in verdict(MODEL_PROVIDERS[name], got, exact).note


def test_a_missing_adapter_or_other_weights_are_wrong(exact: Path, tmp_path: Path) -> None:
    """By the peers' gate too, which is the wider one."""
    oracle = Oracle(CPU, SPEC)
    oracle.write(str(tmp_path / "weights.pt"))
    for quantised, adapted in ((False, False), (True, True)):
        path = tmp_path / "other.pt"
        oracle.exact(str(path), list(range(12)), 4, quantised=quantised, adapted=adapted)
        torch.save(torch.load(path)["plain"], tmp_path / "got.pt")
        for name in ("ours-dense", "peft"):
            assert not verdict(MODEL_PROVIDERS[name], tmp_path / "got.pt", exact).ok


class Wrong:
    """A process of a provider that answers twice what is right, or only at first what is."""

    def __init__(self, row: Row, good: int) -> None:
        from bench.step_worker import Server

        self.row, self.server, self.good = row, Server(), good

    def ask(self, **command: Any) -> dict[str, Any]:
        found = self.server.answer(command)
        if command["do"] == "check":
            if self.good <= 0:
                torch.save(torch.load(command["path"]) * 2, command["path"])
            self.good -= 1
        return found

    def end(self) -> None:
        del self.server


@pytest.mark.parametrize(("good", "says"), [(0, "logits: "), (1, "after timing: logits: ")])
def test_no_time_of_a_model_that_answers_wrong(
    good: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")

    @contextmanager
    def start(row: Row, python: str) -> Iterator[Wrong]:
        yield Wrong(row, good)

    monkeypatch.setattr("bench.step._start", start)
    case = Case("prefill", "tiny-llama", 9, r=4, adapter_dtype="fp32")
    (row,) = run_model(case, CPU, "ours-dense$", rounds=1)
    assert (row.status, row.samples) == (WRONG, [])
    assert row.note.startswith(says)


def test_what_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_kernels

    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.delattr(lora_kernels, "fuse_projections", raising=False)
    monkeypatch.setattr("bench.step._absent", lambda run, package: package == "unsloth")
    monkeypatch.setattr("bench.step._share_weights", lambda run: None)
    case = Case("prefill", "tiny-llama", 9, r=4, adapter_dtype="fp32")
    rows = run_model(case, CPU, r"unsloth|ours\+fused")
    assert {r.provider: r.status for r in rows} == {"ours+fused": REFUSED, "unsloth": REFUSED}
    notes = {r.provider: r.note for r in rows}
    assert notes["unsloth"] == "unsloth is not installed"
    assert "has no fuse_projections" in notes["ours+fused"]


def test_a_gguf_file_holds_the_models_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    q = torch.arange(16 * 3.0).view(16, 3)
    assert torch.equal(halves(interleaved(q, 2), 2), q)
    assert interleaved(q, 2)[:4, 0].tolist() == [0, 12, 3, 15]  # rows 0, 4, 1, 5
    model = load_model(SPEC, CPU)
    path = tmp_path / "model.gguf"
    write_model(model, str(path))
    read = read_weights(str(path), model.config)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert set(read) == {gguf_name(n) for n in matrices}
    for name, p in matrices.items():
        assert torch.equal(read[gguf_name(name)](), p.float()), name
