"""pytest on the GPU: what is marked gpu, and a sample of the parity grid."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from tools.gpu import files, outcomes
from tools.gpu.context import ROOT, Context

GRID = "tests/ops/test_parity.py"
# Every other file that marks a test gpu; a test compares the list with the files.
MARKED = ("tests/device", "tests/ops/test_tiles.py", "tests/serving/test_pool.py")


def tests(context: Context) -> None:
    if context.dry:
        _pytest(context, ["tests/device/test_places.py", "-k", "cpu and lora_linear"])
    _pytest(context, [*MARKED, "-m", "gpu", "--sample", "1"])


def grid(context: Context) -> None:
    """tests/sampling.py chooses the cases by their names and the commit."""
    if context.dry:
        # Interpreted, the inputs of some backwards would take minutes to make.
        os.environ.pop("TRITON_INTERPRET", None)
        _pytest(context, [GRID, "-k", "glu_fwd-reference and 5x31", "--sample", "1"])
    _pytest(context, [GRID, "-m", "gpu", "--sample", str(context.sample)])


def _pytest(context: Context, chosen: list[str]) -> None:
    if importlib.util.find_spec("pytest") is None:
        context.answer(False, "not run: pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "tools.gpu.outcomes", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--maxfail=400", "--no-header"]
    if importlib.util.find_spec("xdist") is not None:
        # Each process collects all of it: cheap on the cores of a GPU's machine.
        processes = 1 if context.dry else context.processes
        command += ["-n", str(processes), "--dist", "worksteal"]
    command += chosen
    print(" ".join(command), flush=True)
    path = context.correctness
    path.with_name(f"{context.step}.counts").unlink(missing_ok=True)
    # Not those of a pytest that this may run under.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env |= {outcomes.STEP: context.step, outcomes.PATH: str(path)}
    done = subprocess.run(command, cwd=ROOT, env=env)
    found = outcomes.counts(path, context.step)
    words = ", ".join(f"{n} {kind}" for kind, n in found.items())
    if not found["passed"]:
        context.row("pytest", files.FAILED, f"no test passed, status {done.returncode}: {words}")
    context.answer(
        done.returncode == 0 and found["passed"] > 0,
        f"{words}, pytest's status {done.returncode}",
        counts=found,
    )
