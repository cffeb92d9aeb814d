"""The commands, from end to end on tiny cases; files; numbers. No time is ever asserted."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import compare, report
from bench.__main__ import main
from bench.cases import Case
from bench.machine import Limits, describe, measure_limits
from bench.providers import PROVIDERS, Prepared
from bench.runner import (
    Row,
    Settings,
    _Entry,
    _sample,
    _warm_up,
    derive,
    paired_ratio,
    rotated,
)
from bench.timing import Stopwatch, percentile
from tools.records import write_atomic

ONLY = ["--suite", "smoke", "--rotate-mib", "1", "--providers", "ours:reference|dense|bnb-train"]
CASES = "nf4_linear/fwd/tiny|dequantize"


def run(tmp_path: Path, name: str = "out") -> Path:
    output = tmp_path / name
    args = ["run", *ONLY, "--only", CASES, "--seconds", "0.01", "--output", str(output)]
    assert main(args) == 0
    return output.with_suffix(".json")


def test_run_plot_compare_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path)
    doc = report.load(path)
    assert doc["machine"]["threads"] == torch.get_num_threads()
    assert doc["machine"]["versions"]["torch"] == torch.__version__
    assert doc["limits"]["read"] > 0
    assert "--suite smoke" in doc["settings"]["command"]
    timed = [r for r in doc["rows"] if r["status"] == "ok"]
    assert {(r["op"], r["provider"]) for r in timed} >= {
        ("nf4_linear", "ours:reference"),
        ("nf4_linear", "dense"),
        ("nf4_dequantize", "ours:reference"),
    }
    for row in timed:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert len(row["samples"]) == row["rounds"] >= 7
        assert row["over_floor"] == pytest.approx(row["p50"] / row["floor"])
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["case"], r["provider"]) for r in table] == [
        (r["case"], r["provider"]) for r in doc["rows"]
    ]
    assert all(r["cpu"] and r["threads"] and r["torch"] for r in table)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    assert main(["plot", str(path)]) == 0
    pictures = sorted(p.name for p in tmp_path.glob("*.png"))
    assert pictures == ["out-roofline.png", "out-speedup.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    other = run(tmp_path, "again")
    capsys.readouterr()
    assert main(["compare", str(path), str(other)]) == 0
    assert "nf4_dequantize/tiny/bf16" in capsys.readouterr().out
    assert main(["targets", str(path)]) == 0
    assert "not measured" in capsys.readouterr().out


def test_verify_times_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify", *ONLY, "--only", CASES]) == 0
    out = capsys.readouterr().out
    assert out.endswith("4 ok\n")
    assert "µs" not in out
    assert list(tmp_path.iterdir()) == []


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--suite", "targets", "--only", "quantize"]) == 0
    assert capsys.readouterr().out.split() == [
        "nf4_dequantize/square-4096/bf16",
        "nf4_quantize/square-4096/bf16",
    ]
    assert main(["list", "--suite", "lora", "--only", "glu/fwd/"]) == 0
    assert capsys.readouterr().out.split() == [
        f"glu/fwd/llama-3.1-8b.gate_proj/M{m}/bf16" for m in (1, 16, 2048, 8192)
    ]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["run", "--device", "tpu"], "tpu"),
        (["run", "--threads", "0"], "threads: got 0"),
        (["run", "--seconds", "0"], "seconds: got 0.0"),
        (["run", "--only", "zzz"], "only: 'zzz' matches no case"),
        (["verify", "--providers", "zzz"], "providers: 'zzz' matches none"),
        (["plot", "missing.json"], "missing.json"),
        (["compare", "missing.json", "missing.json"], "missing.json"),
    ],
)
def test_bad_arguments(
    args: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert says in capsys.readouterr().err


def test_a_wrong_result_makes_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch.nn.functional as F

    from bench.providers import plain

    monkeypatch.setattr(plain, "linear", lambda x, w, b=None: 2 * F.linear(x, w, b))
    args = ["verify", *ONLY, "--only", "nf4_linear/fwd/tiny"]
    assert main(args) == 1
    assert "dense: wrong: y: rms error" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    path.write_text("before")

    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_load_refuses_other_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a result file"):
        report.load(path)


def test_compare_tells_noise_from_change() -> None:
    def doc(**p: tuple[float, float, float]) -> dict[str, object]:
        rows = [
            {"case": "c", "provider": k, "p20": v[0], "p50": v[1], "p80": v[2], "status": "ok"}
            for k, v in p.items()
        ]
        return {"rows": rows}

    a = doc(faster=(9, 10, 11), noisy=(9, 10, 11), gone=(1, 1, 1))
    b = doc(faster=(4, 5, 6), noisy=(10, 12, 13), new=(1, 1, 1))
    found = {c.provider: c for c in compare.changes(a, b)}
    assert set(found) == {"faster", "noisy"}
    assert (found["faster"].ratio, found["faster"].clear) == (0.5, True)
    assert not found["noisy"].clear
    assert compare.only_in_one(a, b) == (["c gone (absent)"], ["c new"])


def test_percentiles_and_ratios() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0, 5.0], q) for q in (0, 0.2, 0.5, 1)] == [1, 1.8, 3, 5]
    assert paired_ratio([1.0, 2.0, 30.0], [2.0, 2.0, 3.0]) == 1.0
    assert paired_ratio([], [1.0]) is None
    with pytest.raises(ValueError, match="values: got none"):
        percentile([], 0.5)


def test_rotation_changes_place_and_neighbour() -> None:
    orders = [rotated([1, 2, 3], turn) for turn in range(6)]
    assert orders[:3] == [[1, 2, 3], [1, 3, 2], [3, 1, 2]]
    assert {order[0] for order in orders} == {1, 2, 3}
    before_2 = {order[order.index(2) - 1] for order in orders if order.index(2)}
    assert before_2 == {1, 3}
    assert rotated([], 3) == []


def test_derived_numbers() -> None:
    row = Row(Case("nf4_linear", "square-4096", 1), "x", samples=[2e-3])
    derive(row, Limits(read=1e10, copy=1e10, gemm={"bf16": 1e12}))
    assert row.flops_per_s == pytest.approx(2 * 4096**2 / 2e-3)
    assert row.floor == pytest.approx(8_672_260e-10, rel=0.01)
    assert row.over_floor == pytest.approx(2e-3 / row.floor)


def test_limits_and_machine() -> None:
    limits = measure_limits(torch.device("cpu"), ["fp32"], buffer_bytes=1 << 20, gemm_size=64)
    assert min(limits.read, limits.copy, limits.gemm["fp32"]) > 0
    machine = describe(torch.device("cpu"))
    assert machine["cpu"]
    assert json.loads(json.dumps(machine)) == machine


class GraphStopwatch(Stopwatch):
    """Pretends that calls are short and can be captured, as on CUDA."""

    repeats = False

    def __init__(self, capturable: bool) -> None:
        self.capturable = capturable
        self.replays: list[int] = []

    def time(self, call: Callable[[], object]) -> float:
        call()
        return 1e-6

    def capture(self, call: Callable[[], object]) -> Callable[[], object] | None:
        copy = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[copy] += 1

        return replay if self.capturable else None


@pytest.mark.parametrize("capturable", [True, False])
def test_short_calls_are_replayed_from_one_graph_a_copy(capturable: bool) -> None:
    calls: list[int] = []

    def call(i: int) -> dict[str, torch.Tensor]:
        calls.append(i)
        return {}

    case = Case("nf4_linear", "tiny", 1)
    entry = _Entry(Row(case, "x"), PROVIDERS[0], Prepared(call, copies=3), call)
    stopwatch = GraphStopwatch(capturable)
    _warm_up(entry, stopwatch, Settings())
    warm = len(calls)
    for _ in range(6):
        _sample(entry, stopwatch)
    assert entry.row.graph is capturable
    if capturable:
        assert stopwatch.replays == [2, 2, 2]
        assert len(calls) == warm
    else:
        assert len(calls) == warm + 6
        assert {i % 3 for i in calls[-6:]} == {0, 1, 2}
