"""The GPU script's steps: what they make of a sanitizer's words, of tests that lose the device, of
a bench that dies; and that no test marked gpu is left out."""

from __future__ import annotations

import ast
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.variants import interpreting
from tools.gpu import direct_calls, files, outcomes, pool, state
from tools.gpu.context import ROOT, Context, answer_file
from tools.gpu.plan import STEPS
from tools.gpu.steps import bench, build, canary, ncu, parity, sanitizer, smoke

DONE = f"{direct_calls.DONE} 12\n"
CALLS = "direct call: a\n" * 12


@pytest.mark.parametrize(
    ("status", "text", "verdict", "says"),
    [
        (0, f"{CALLS}{DONE}========= ERROR SUMMARY: 0 errors\n", "ok", "12 of 12 calls"),
        (9, f"{CALLS}{DONE}========= ERROR SUMMARY: 2 errors\n", "wrong", "2 reported"),
        (0, f"{DONE}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors", "ok", "none"),
        (9, f"{DONE}========= RACECHECK SUMMARY: 3 hazards displayed (3 errors", "wrong", "3 rep"),
        (0, f"{CALLS}{DONE}", "failed", "no summary"),
        (1, "========= Error: Device not supported\n", "failed", "no summary"),
        (
            5,
            f"{CALLS}refused: x: no backend\n{DONE}ERROR SUMMARY: 0 errors",
            "failed",
            "refused: x",
        ),
        (255, f"{CALLS}ERROR SUMMARY: 0 errors", "failed", "not all of 12 calls"),
    ],
)
def test_only_a_whole_run_without_errors_is_right(
    status: int, text: str, verdict: str, says: str
) -> None:
    found, note = sanitizer.judge(status, text)
    assert found == verdict and says in note


def test_argument_lists(tmp_path: Path) -> None:
    line = sanitizer.command("/opt/compute-sanitizer", "racecheck", "cuda:1")
    assert line[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert line[-5:] == ["-m", "tools.gpu.direct_calls", "racecheck", "--device", "cuda:1"]
    line = ncu.command("ncu", tmp_path / "log", "cuda")
    assert line[1:3] == ["--clock-control", "none"] and "--csv" in line
    assert line[-3:] == ["profile", "--device", "cuda"]


def test_a_call_that_is_refused_or_fails_is_in_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_kernels.dispatch.op import BackendError

    def refuse() -> None:
        raise BackendError("not here")

    def fail() -> None:
        raise AssertionError("wrong")

    for calls, status in (([refuse], 5), ([refuse, fail], 1), ([fail, refuse], 1)):
        made = [(f"call {i}", c) for i, c in enumerate(calls)]
        monkeypatch.setitem(direct_calls.SETS, "memcheck", lambda device, tiny, m=made: iter(m))
        assert direct_calls.main(["memcheck", "--device", "cpu"]) == status
        assert f"{direct_calls.DONE} 0" in capsys.readouterr().out


def test_a_dozen_calls_and_every_native_op() -> None:
    assert len(list(direct_calls.memcheck("cpu", True))) == 12
    assert len(list(direct_calls.profile("cpu", True))) == 4


def test_every_file_that_marks_a_test_gpu_is_run() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"\bmark\.gpu\b", path.read_text()) and path.name != Path(__file__).name
    }
    listed = (parity.GRID, *parity.MARKED)
    assert marked - {"tests/device/conftest.py"}
    for name in marked:
        assert any(name == place or name.startswith(f"{place}/") for place in listed), name
    assert all((ROOT / place).exists() for place in listed)


def test_every_step_has_its_function() -> None:
    for step in STEPS:
        module, _, function = step.function.partition(":")
        assert (ROOT / "tools" / "gpu" / "steps" / f"{module}.py").exists()
        assert f"def {function}(" in (ROOT / f"tools/gpu/steps/{module}.py").read_text()


def test_the_extension_is_built_for_the_gpu_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("LORA_KERNELS_CMAKE_ARGS", raising=False)
    context = Context("build", "cuda", tmp_path, 1, 1.0, 60.0, False)
    command, env = build._command(context)
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert env["LORA_KERNELS_CMAKE_ARGS"] == "-DLORA_KERNELS_CUDA_ARCHS=90a-real"
    monkeypatch.setenv("LORA_KERNELS_CMAKE_ARGS", "-DLORA_KERNELS_CUDA_ARCHS=80")
    assert build._command(context)[1]["LORA_KERNELS_CMAKE_ARGS"].endswith("ARCHS=80")


FAKE = """#!/bin/sh
# Runs what it is given, as the tool does, and says what the tool would.
while [ "$1" != "{python}" ]; do case "$1" in --log-file) log=$2;; esac; shift; done
"$@"; status=$?
{more}
exit $status
"""


def fake_tool(folder: Path, name: str, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / name
    path.write_text(FAKE.format(python=sys.executable, more=more))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def end_of(step: Any, context: Context, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a step answers, without the end of this process."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("tools.gpu.context.os._exit", leave)
    with pytest.raises(SystemExit):
        step(context)
    return dict(files.read_json(answer_file(context.work, context.step)) or {})


@pytest.mark.slow
@pytest.mark.parametrize("errors", [0, 2])
def test_a_sanitizers_run(errors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = f"echo '========= ERROR SUMMARY: {errors} errors'; [ {errors} = 0 ] || status=9"
    fake_tool(tmp_path, "compute-sanitizer", more, monkeypatch)
    context = Context("memcheck", "cpu", tmp_path, 1, 1.0, 60.0, dry=False)
    answer = end_of(sanitizer.memcheck, context, monkeypatch)
    (row,) = files.rows_of(tmp_path / files.CORRECTNESS, "memcheck")
    assert answer["ok"] == (errors == 0)
    assert row["status"] == ("wrong" if errors else "ok") and "12 of 12 calls" in row["note"]


@pytest.mark.slow
def test_ncus_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = 'printf \'==PROF== hello\\n"ID"\\n""\\n"0"\\n"1"\\n\' >$log'
    fake_tool(tmp_path, "ncu", more, monkeypatch)
    context = Context("ncu", "cpu", tmp_path, 1, 1.0, 60.0, dry=False)
    answer = end_of(ncu.run, context, monkeypatch)
    assert answer["ok"] and answer["words"] == "2 kernels, ncu's status 0"
    assert (tmp_path / files.NCU).read_text() == '"ID"\n""\n"0"\n"1"\n'


def test_a_tool_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sanitizer, ncu):
        monkeypatch.setattr(module, "find_tool", lambda name: None)
    for step, name in ((sanitizer.racecheck, "racecheck"), (ncu.run, "ncu")):
        context = Context(name, "cuda", tmp_path, 1, 1.0, 60.0, dry=False)
        answer = end_of(step, context, monkeypatch)
        assert not answer["ok"] and "is not installed" in answer["words"]


def test_every_name_of_torch_cuda_that_only_a_gpu_runs_is_there() -> None:
    """Under this torch; the lines that use them need a device."""
    names = set()
    for folder in ("tools", "bench", "tests/device"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                if re.fullmatch(r"torch\.cuda(\.\w+)+", found):
                    names.add(found.removeprefix("torch.cuda."))
    assert {"CUDAGraph", "_sleep", "profiler.start", "default_generators"} <= names
    for name in names:
        operator.attrgetter(name)(torch.cuda)
    for method in ("graphsafe_set_state", "graphsafe_get_state"):
        assert hasattr(torch.Generator, method)


def test_without_a_gpu_the_run_stops_and_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    places = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "output")]
    command = [sys.executable, "-m", "tools.gpu", "--only", "environment", "smoke", "bench"]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("verdict: stopped: torch") and "sees no CUDA device" in last
    steps = json.loads((tmp_path / "output" / files.SUMMARY).read_text())["steps"]
    assert [steps[name]["status"] for name in ("smoke", "bench")] == ["not run"] * 2


# --- smoke and canary -----------------------------------------------------------------------------


def test_a_failed_assertion_is_a_wrong_result() -> None:
    job = pool.Job("a b", "x:y")
    assert smoke.verdict(pool.Done(job, "failed", note="AssertionError: y: off"))[0] == "wrong"
    assert smoke.verdict(pool.Done(job, "failed", note="ValueError: no"))[0] == "failed"
    assert smoke.verdict(pool.Done(job, "died", note="gone")) == ("died", "gone")
    assert smoke.verdict(pool.Done(job, "ok", {"status": "refused", "note": "no"})) == (
        "refused", "no"
    )  # fmt: skip


def test_a_smoke_call_of_the_reference_is_right_and_an_absent_backend_refuses() -> None:
    assert "note" in smoke.call("glu_fwd", "reference", "cpu")
    found = smoke.call("linear_cross_entropy", "triton", "cpu")
    assert found == {"status": "refused", "note": "has no implementation of this op"}


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 is not set")
def test_a_race_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"function": "gated_activation", "m": 5, "dropout": 0.0, "strategy": None, "tile": None}
    assert canary.run_one(dict(one), "cpu", 3)["note"] == "3 repeats, the same bits"
    whole, calls = canary.Call.results, []

    def results(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = whole(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:  # the second repeat; the first three are the check's
            found["dup"][1, 2] += 1
        return found

    monkeypatch.setattr(canary.Call, "results", results)
    found = canary.run_one(dict(one), "cpu", 3)
    assert found["status"] == "wrong"
    assert "a race: dup in 1 of 3 repeats, up to 1 elements" in found["note"]


def test_a_tile_that_cannot_run_is_refused_and_says_why() -> None:
    one = canary.Canary("lora_linear", 8192, strategy="single_pass", tile=canary.WIDE[0])
    with canary.use_executor(canary.Forced(torch.device("cpu"), canary.WIDE[0])):
        reason = canary._refusal(one, canary.TINY, torch.device("cpu"))
    assert reason  # the generic card has neither the memory nor descriptors for it


# --- pytest's outcomes ----------------------------------------------------------------------------

TESTS = """
import os, pytest
def test_passes(): pass
def test_skips(): pytest.skip("no")
def test_is_wrong(): assert 1 == 2
def test_raises(): raise ValueError("no good")
def test_loses_the_device(): raise RuntimeError("CUDA error: device-side assert triggered")
@pytest.mark.parametrize("i", range(6))
def test_after_it(i): assert os.environ.get("LOST") is None
def test_dies(): os._exit(1)
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_each_outcome_is_written_and_a_lost_device_costs_one_test(
    tmp_path: Path, processes: int
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    text = TESTS if processes else TESTS.partition("def test_dies")[0]
    (tmp_path / "test_them.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    rows = tmp_path / "rows.csv"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {outcomes.STEP: "tests", outcomes.PATH: str(rows), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.gpu.outcomes", str(tmp_path)]
    command += ["-n", str(processes)] if processes else ["-p", "no:xdist"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    found = {r["what"].split("::")[-1]: r for r in files.rows_of(rows, "tests")}
    assert found["test_is_wrong"]["status"] == "wrong"
    assert found["test_raises"]["status"] == "failed"
    assert "no good" in found["test_raises"]["note"]
    assert found["test_loses_the_device"]["status"] in ("failed", "died")
    counts = outcomes.counts(rows, "tests")
    assert counts["skipped"] == 1 and counts["passed"] == 7, done.stdout
    if processes:
        assert found["test_dies"]["status"] == "died"


# --- the bench ------------------------------------------------------------------------------------


def test_a_bench_whose_process_dies_goes_on(tmp_path: Path) -> None:
    """With its next case; and the answer says what there is."""
    code = """
import os, sys
from tools.gpu.steps import bench
from tools.gpu.context import Context
context = Context("bench", "cpu", __import__("pathlib").Path(sys.argv[1]), 1, 1.0, 600.0, True)
cases = bench.suite("gpu-tiny")
bench.suite = lambda name: [c for c in cases if c.op == "glu"][:1] + [
    c for c in cases if c.name.startswith("lora_linear/fwd/")][:1]
bench.ON_CPU = "dense"
run = bench.child.run
def dying(command, **kwargs):
    code = "import os, bench.__main__ as b; one = b._run_one\\n"
    code += "def f(case, *a):\\n    if case.op == 'lora_linear': os._exit(7)\\n"
    code += "    return one(case, *a)\\n"
    code += "b._run_one = f; import sys; sys.exit(b.main(sys.argv[1:]))"
    return run([command[0], "-c", code, *command[3:]], **kwargs)
bench.child.run = dying
bench.run(context)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    answer = json.loads(answer_file(tmp_path, "bench").read_text())
    assert done.stdout.count("ended with status 7") == 2, done.stdout + done.stderr
    assert "1 failed" in answer["words"] and answer["facts"]["limits"]
    rows = json.loads((tmp_path / files.BENCH_JSON).read_text())["rows"]
    assert any(row["status"] == "failed" and row["case"].startswith("lora") for row in rows)


def test_a_bench_that_stands_still_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    stuck = bench.Stuck(tmp_path / "bench.json")
    now[0] = bench.CASE_LIMIT - 1
    assert not stuck()
    (tmp_path / "bench.json").write_text("{}")
    assert not stuck()
    now[0] += bench.CASE_LIMIT + 1
    assert stuck()


def test_the_sources_are_hashed_without_git() -> None:
    found = {p.relative_to(ROOT).parts[0] for p in state._files()}
    assert found == set(state.SOURCES)
