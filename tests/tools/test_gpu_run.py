"""The GPU script's runner: limits, deaths, resuming, what is written. Its steps here are small
programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu import __main__ as program
from tools.gpu import child, files, pool
from tools.gpu.__main__ import main
from tools.gpu.context import ROOT, Context, answer_file
from tools.gpu.plan import PHASES, STEPS, Step, steps
from tools.gpu.run import Runner
from tools.gpu.state import State, identity

HEAD = "import os, sys, time, subprocess; from tools.gpu.context import Context; "
GOOD = "c.row('a call', 'ok'); c.answer(True, 'well')"
PROGRAMS = {
    "good": GOOD,
    "wrong": "c.row('a call', 'wrong', 'by 3'); c.answer(False, 'one is wrong')",
    "dies": "print('last words', flush=True); os.kill(os.getpid(), 11)",
    "hangs": "subprocess.Popen(['sleep', '600']); c.row('begun', 'ok'); time.sleep(600)",
    "stops": "c.answer(False, 'no device', stop=True)",
    "silent": "pass",
}


def step(name: str, limit: float = 60.0, phase: str = "A", **more: bool) -> Step:
    return Step(name, phase, limit, "none:none", "a test's", **more)


class Run:
    """A runner of programs; `ran` are the steps that were started, in order."""

    def __init__(self, folder: Path) -> None:
        self.work, self.output = folder / "work", folder / "output"
        self.ran: list[str] = []

    def __call__(self, *todo: Step, programs: dict[str, str] = PROGRAMS, **more: object) -> int:
        self.work.mkdir(exist_ok=True)
        path, of = self.work / files.SUMMARY, {"device": "none"}
        state = State.load(path, of) or State(path, of)

        def command(context: Context) -> list[str]:
            self.ran.append(context.step)
            arguments = [context.step, *context.arguments()]
            code = f"c = Context.parse(sys.argv[1], sys.argv[2:]); {programs[context.step]}"
            return [sys.executable, "-c", HEAD + code, *arguments]

        self.runner = Runner(
            todo, state, "cpu", self.work, self.output, 2, 1.0, True, command=command, **more
        )
        before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        try:
            return self.runner.run()
        finally:
            for number, handler in zip(
                (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), before, strict=True
            ):
                signal.signal(number, handler)

    @property
    def said(self) -> dict[str, str]:
        doc = json.loads((self.output / files.SUMMARY).read_text())
        return {name: entry["status"] for name, entry in doc["steps"].items()}

    @property
    def log(self) -> str:
        return (self.output / files.LOG).read_text()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def alive(command: str) -> bool:
    found = subprocess.run(["pgrep", "-f", command], capture_output=True, text=True)
    return any(line != str(os.getpid()) for line in found.stdout.split())


def test_all_is_well(run: Run) -> None:
    assert run(step("good")) == 0
    assert run.said == {"good": "ok"}
    assert run.log.splitlines()[-1] == "verdict: 1 of 1 steps ok"
    rows = files.rows_of(run.output / files.CORRECTNESS)
    assert [(r["step"], r["what"], r["status"]) for r in rows] == [("good", "a call", "ok")]


def test_one_that_dies_hangs_or_is_wrong_does_not_stop_the_rest(run: Run) -> None:
    mark = f"sleep {600 + os.getpid() % 10000 / 1e4:.4f}"  # one's own
    programs = PROGRAMS | {
        "hangs": f"subprocess.Popen({mark.split()!r}); c.row('begun', 'ok'); time.sleep(600)"
    }
    todo = [step("dies"), step("hangs", 8), step("wrong"), step("silent"), step("good")]
    assert run(*todo, programs=programs) == 1
    assert run.said == {
        "dies": "died", "hangs": "cut", "wrong": "wrong", "silent": "died", "good": "ok"
    }  # fmt: skip
    steps = json.loads((run.output / files.SUMMARY).read_text())["steps"]
    assert "status -11" in steps["dies"]["words"] and "last words" in run.log
    assert "limit of 8 s" in steps["hangs"]["words"]
    assert not alive(mark)  # its own children ended with it
    rows = files.rows_of(run.output / files.CORRECTNESS)
    assert {(r["step"], r["status"]) for r in rows} == {
        ("hangs", "ok"), ("wrong", "wrong"), ("good", "ok")
    }  # fmt: skip
    last = run.log.splitlines()[-1]
    assert last.startswith("verdict: 1 of 5 steps ok") and "cut: hangs" in last


def test_a_second_run_goes_on_where_the_first_one_stopped(run: Run) -> None:
    todo = [step("good"), step("wrong"), step("dies")]
    assert run(*todo) == 1
    assert run(*todo, programs=PROGRAMS | {"dies": GOOD}) == 1  # one is wrong still
    assert run.ran == ["good", "wrong", "dies", "dies"]
    assert run.said == {"good": "ok", "wrong": "wrong", "dies": "ok"}
    rows = files.rows_of(run.output / files.CORRECTNESS)
    assert sorted(r["step"] for r in rows) == ["dies", "good", "wrong"]


def test_the_files_come_back_to_an_emptied_output_folder(run: Run) -> None:
    assert run(step("good")) == 0
    for path in run.output.iterdir():
        path.unlink()
    assert run(step("good")) == 0
    assert run.ran == ["good"]
    assert run.said == {"good": "ok"} and "a call" in (run.output / files.CORRECTNESS).read_text()


def test_a_step_that_is_begun_again_has_its_rows_once(run: Run) -> None:
    first = PROGRAMS | {"dies": "c.row('half', 'ok'); os.kill(os.getpid(), 9)"}
    assert run(step("dies"), programs=first) == 1
    assert run(step("dies"), programs=PROGRAMS | {"dies": GOOD}) == 0
    rows = files.rows_of(run.output / files.CORRECTNESS)
    assert [r["what"] for r in rows] == ["a call"]


def test_without_a_device_nothing_runs(run: Run) -> None:
    assert run(step("stops"), step("good"), step("good", phase="B")) == 4
    assert run.ran == ["stops"]
    assert run.said == {"stops": "wrong", "good": "not run"}
    assert "verdict: stopped: no device" in run.log
    assert run(step("stops"), step("good"), programs=PROGRAMS | {"stops": GOOD}) == 0
    assert run.ran == ["stops", "stops", "good"]  # there may be one now


def test_a_phase_that_has_used_up_its_time(run: Run) -> None:
    programs = PROGRAMS | {"slow": "time.sleep(600)"}
    todo = [step("slow"), step("good"), step("good2", phase="B")]
    limits = {"A": 7.0, "B": 60.0}
    assert run(*todo, programs=programs | {"good2": GOOD}, limits=limits) == 3
    assert run.said == {"slow": "cut", "good": "not run", "good2": "ok"}
    assert "run again to go on" in run.log


def test_a_longer_phase_gives_each_step_more(run: Run) -> None:
    longer = {"A": 3 * PHASES["A"], "B": PHASES["B"]}
    assert run(step("good", 40), limits=longer) == 0
    assert "at most 120 s" in run.log


def test_a_signal_ends_the_step_and_keeps_what_there_is(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.tools.test_gpu_run import Run, step; "
        "sys.exit(Run(Path(sys.argv[1]))(step('good'), step('hangs', 300)))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while "begun" not in _text(tmp_path / "work" / files.CORRECTNESS):
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.1)
        runner.terminate()
        assert runner.wait(60) == 3
    finally:
        runner.kill()
    doc = json.loads((tmp_path / "output" / files.SUMMARY).read_text())
    assert {n: e["status"] for n, e in doc["steps"].items()} == {"good": "ok", "hangs": "cut"}
    assert "interrupted: SIGTERM" in _text(tmp_path / "output" / files.LOG)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_no_more_than_eight_files(run: Run) -> None:
    assert len(files.FILES) == 8 == len(set(files.FILES))
    assert {name for s in STEPS for name in s.files} < set(files.FILES)
    programs = {"good": "open(c.work / 'another', 'w').write('x'); " + GOOD}
    assert run(step("good"), programs=programs) == 0
    assert {p.name for p in run.output.iterdir()} == {
        files.LOG, files.SUMMARY, files.CORRECTNESS
    }  # fmt: skip


def test_another_source_is_another_run(tmp_path: Path) -> None:
    of = identity("gpu", False)
    assert of == identity("gpu", False) != identity("gpu", True)
    State(tmp_path / "s.json", of).save()
    assert State.load(tmp_path / "s.json", of) is not None
    assert State.load(tmp_path / "s.json", of | {"sources": "0"}) is None
    (tmp_path / "s.json").write_text('{"of": ')  # half a file
    assert State.load(tmp_path / "s.json", of) is None


def test_phases() -> None:
    assert [s.name for s in steps("all")] == [s.name for s in STEPS]
    assert [s.name for s in steps("B")][:2] == ["build", "environment"]
    assert {s.phase for s in steps("A")} == {"A"}
    with pytest.raises(ValueError, match="got 'no', expected some of build, environment"):
        steps("all", ["no"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "cpu"], "--device: got 'cpu', expected cuda or cuda:N; --dry-run"),
        (["--device", "cuda", "--dry-run"], "expected cpu with --dry-run"),
        (["--sample", "0", "--dry-run"], "--sample: got 0.0"),
        (["--processes", "0", "--dry-run"], "--processes: got 0"),
        (["--limit", "-1", "--dry-run"], "--limit: got -1.0"),
        (["--only", "nothing"], "--only: got 'nothing'"),
    ],
)
def test_bad_arguments(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("says", "name", "processes"),
    [
        ("NVIDIA H200, 143771", "nvidia-h200", 14),
        ("NVIDIA GeForce RTX 4090, 24564", "nvidia-geforce-rtx-4090", 2),
        ("No devices were found", "cuda-1", 14),
    ],
)
def test_a_gpus_folder_and_processes(
    says: str, name: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(program.os, "cpu_count", lambda: 16)
    found, gigabytes = program._gpu("cuda:1")
    assert (found, program._processes(gigabytes)) == (name, processes)


def test_a_folder_of_other_files_is_not_emptied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["--dry-run", "--work", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_command_at_its_limit_is_ended_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    mark = f"sleep {700 + os.getpid() % 10000 / 1e4:.4f}"
    ended = child.run(["bash", "-c", f"echo begun; {mark} & {mark}"], log=log, limit=1.0)
    assert ended.status is None and ended.seconds > 0.9
    assert log.read_text() == "begun\n" and not alive(mark)
    assert child.run(["false"], log=log, limit=60).status == 1


# --- the pool -------------------------------------------------------------------------------------

HERE = "tests.tools.test_gpu_run:"


def job_returns(value: int) -> int:
    print("not an answer")
    return value + 1


def job_raises() -> None:
    raise ValueError("no good")


def job_loses_the_device() -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


def job_dies() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def job_hangs() -> None:
    time.sleep(600)


def job_pid() -> int:
    return os.getpid()


def test_a_job_that_dies_or_hangs_is_its_own_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    names = ["dies", "raises", "hangs", "loses_the_device"]
    jobs = [pool.Job(name, f"{HERE}job_{name}", limit=3.0) for name in names]
    jobs += [pool.Job(str(i), f"{HERE}job_returns", {"value": i}) for i in range(3)]
    found: dict[str, pool.Done] = {}
    pool.run(jobs, 2, lambda done: found.update({done.job.name: done}))
    assert {name: d.status for name, d in found.items()} == {
        "dies": "died", "raises": "failed", "hangs": "hung", "loses_the_device": "failed",
        "0": "ok", "1": "ok", "2": "ok",
    }  # fmt: skip
    assert [found[str(i)].value for i in range(3)] == [1, 2, 3]
    assert found["raises"].note == "ValueError: no good"
    assert "Segmentation fault" in found["dies"].note
    assert "not done after 3 s" in found["hangs"].note


def test_a_process_that_has_lost_its_device_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    worker = pool.Worker()
    try:
        pids = [
            worker.run(pool.Job(name, f"{HERE}job_{name}")).value
            for name in ("pid", "raises", "pid", "loses_the_device", "pid")
        ]
    finally:
        worker.close()
    assert pids[0] == pids[2] != pids[4]


def test_rows_are_whole_lines_whatever_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    files.append(path, [{"step": "a", "what": 'x,"y"\nz', "note": "n" * 5000}])
    files.append(path, [{"step": "b", "what": "é\ud800"}])  # no UTF-8
    a, b = files.rows_of(path)
    assert a["what"] == 'x,"y"\nz' and len(a["note"]) == files.LONGEST_NOTE
    assert b["step"] == "b" and files.rows_of(path, "a") == [a]
    assert answer_file(tmp_path, "a").parent.name == "answers"
