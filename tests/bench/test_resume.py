"""`bench run --resume`: what is done is not done again, and a case that ends its process does not
end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as program
from bench import report, resume
from bench.__main__ import main
from bench.cases import BOTH, Case
from bench.machine import Limits
from bench.runner import FAILED, Row
from bench.suites import suite

ARGS = ["run", "--suite", "smoke", "--rotate-mib", "1", "--providers", "dense|ours:reference"]
ARGS += ["--only", "^nf4_linear", "--seconds", "0.001", "--rounds", "1"]
CASES = [c.name for c in suite("smoke", "^nf4_linear")]


def rows(path: Path) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in report.load(path)["rows"]))


def test_it_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, ran = tmp_path / "out", []
    whole, dies = program._run_one, [CASES[1]]

    def run_one(case: Case, *args: object) -> list[Row]:
        ran.append(case.name)
        if case.name in dies:
            raise KeyboardInterrupt  # as a process that ends: nothing is written after it
        return whole(case, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(program, "_run_one", run_one)
    args = [*ARGS, "--output", str(output), "--resume"]
    assert main(args) == 130
    assert report.load(output.with_suffix(".json"))["tries"] == {CASES[1]: 1}
    dies.clear()
    assert main(args) == 0
    assert ran == [CASES[0], CASES[1], CASES[1]]
    assert rows(output.with_suffix(".json")) == CASES
    assert report.load(output.with_suffix(".json"))["tries"] == {}
    assert main(args) == 0 and len(ran) == 3
    assert main(args[:-1]) == 0 and len(ran) == 5  # without --resume: from the start


def test_a_case_that_ends_its_process_twice_is_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, whole = tmp_path / "out", program._run_one

    def run_one(case: Case, *args: object) -> list[Row]:
        if case.name == CASES[0]:
            raise KeyboardInterrupt
        return whole(case, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(program, "_run_one", run_one)
    args = [*ARGS, "--output", str(output), "--resume"]
    assert [main(args) for _ in range(3)] == [130, 130, 0]
    found = report.load(output.with_suffix(".json"))["rows"]
    assert found[0]["case"] == CASES[0] and found[0]["status"] == FAILED
    assert "ended the process" in found[0]["note"]
    assert [r["case"] for r in found[1:]] == [CASES[1]] * 2


def test_rows_come_back_as_they_were() -> None:
    case = Case("lora_linear", "tiny", 7, BOTH, 8, 0.25, adapter_dtype="fp32")
    row = Row(case, "ours:triton", p50=1e-3, samples=[1e-3, 2e-3], graph=True, waited=True)
    assert resume._row(json.loads(json.dumps(row.as_dict(samples=True)))) == row


def test_another_machines_file_is_refused(tmp_path: Path) -> None:
    machine = {key: "a" for key in resume.SAME}
    doc = report.document({**machine, "versions": {}}, {}, Limits(1.0, 1.0, {}), [])
    (tmp_path / "x.json").write_text(json.dumps(doc))
    with pytest.raises(ValueError, match=r"x.json has versions \{\}, and here it is 'a'"):
        resume.earlier(tmp_path / "x", machine)
    assert resume.earlier(tmp_path / "y", machine) == resume.Earlier()


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_rounds(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--rounds", rounds]) == 2
    assert f"rounds: got {rounds}, expected 1 or more" in capsys.readouterr().err
