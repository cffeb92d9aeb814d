"""`make gpu ARGS=--dry-run`: every step, from the command line, on the CPU."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.gpu import files
from tools.gpu.context import ROOT
from tools.gpu.plan import STEPS

pytestmark = pytest.mark.slow
# A neighbour may take the cores: the limits are for a machine of one's own.
LIMIT = "3000"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    pytest.importorskip("triton", reason="triton is not installed")
    for module in ("peft", "transformers", "xdist"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    folder = tmp_path_factory.mktemp("gpu")
    yield folder / "output", call(folder)


def call(folder: Path, *more: str) -> str:
    places = ["--work", str(folder / "work"), "--output", str(folder / "output")]
    command = [sys.executable, "-m", "tools.gpu", "--dry-run", "--processes", "2", *places]
    done = subprocess.run(
        [*command, "--limit", LIMIT, *more], cwd=ROOT, capture_output=True, text=True
    )
    log = folder / "output" / files.LOG
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-5000:]
    return done.stdout


def test_every_step_is_well_and_wrote_what_it_promises(ran: tuple[Path, str]) -> None:
    output, said = ran
    steps = json.loads((output / files.SUMMARY).read_text())["steps"]
    assert {name: s["status"] for name, s in steps.items()} == {s.name: "ok" for s in STEPS}
    assert said.splitlines()[-1] == f"verdict: {len(STEPS)} of {len(STEPS)} steps ok"
    assert (output / files.LOG).read_text().splitlines()[-1] == said.splitlines()[-1]
    for step in STEPS:
        for name in step.files:
            assert (output / name).stat().st_size, f"{step.name}: {name}"


def test_eight_files_and_no_more(ran: tuple[Path, str]) -> None:
    assert {p.name for p in ran[0].iterdir()} == set(files.FILES)


def test_what_needs_a_gpu_says_so(ran: tuple[Path, str]) -> None:
    steps = json.loads((ran[0] / files.SUMMARY).read_text())["steps"]
    for name in ("memcheck", "racecheck", "ncu"):
        assert steps[name]["words"].startswith("not run: needs a GPU"), name
    assert (ran[0] / files.NCU).read_text() == '"not run: needs a GPU"\n'
    assert "--clock-control none" in (ran[0] / files.LOG).read_text()


def test_what_the_files_hold(ran: tuple[Path, str]) -> None:
    output, _ = ran
    rows = files.rows_of(output / files.CORRECTNESS)
    assert {r["step"] for r in rows} >= {"smoke", "canary", "memcheck", "racecheck"}
    assert {r["backend"] for r in rows if r["step"] == "smoke"} == {
        "native", "triton", "reference"
    }  # fmt: skip
    assert not [r for r in rows if r["status"] in files.BAD]
    doc = json.loads((output / files.BENCH_JSON).read_text())
    assert doc["limits"] and any(row["p50"] for row in doc["rows"])
    with (output / files.HOST).open(newline="") as file:
        host = list(csv.DictReader(file))
    assert {r["kind"] for r in host} == {"time", "graph"}
    assert all(float(r["p50_us"]) > 0 for r in host if r["kind"] == "time")
    assert json.loads((output / files.TUNING).read_text())["gpu"] == "dry run"
    counted = json.loads((output / files.SUMMARY).read_text())["steps"]["parity"]["facts"]
    assert counted["counts"]["passed"] > 0 and counted["counts"]["failed"] == 0


def test_a_second_run_repeats_nothing(ran: tuple[Path, str]) -> None:
    said = call(ran[0].parent)
    assert said.count("from an earlier run") == len(STEPS)
