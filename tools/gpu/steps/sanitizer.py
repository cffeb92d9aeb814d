"""compute-sanitizer over `direct_calls.py`. Its own report is in the log; a line of
correctness.csv says what came of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from tools.gpu import files
from tools.gpu.context import ROOT, Context, find_tool
from tools.gpu.direct_calls import DONE

ERRORS = 9  # the status that the tool gives where it found any
SUMMARY = re.compile(
    r"ERROR SUMMARY: (?P<errors>\d+) error|RACECHECK SUMMARY: (?P<hazards>\d+) hazard"
)


def memcheck(context: Context) -> None:
    # Without torch's caching a read past a tensor is one past its allocation.
    _run(context, "memcheck", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def racecheck(context: Context) -> None:
    _run(context, "racecheck", {})


def command(tool: str, name: str, device: str) -> list[str]:
    options = ["--tool", name, "--target-processes", "all", "--print-limit", "30"]
    if name == "memcheck":  # not the driver's refusals: torch asks for what may not be there
        options += ["--report-api-errors", "no"]
    return [tool, *options, "--error-exitcode", str(ERRORS), *script(name, device)]


def script(name: str, device: str) -> list[str]:
    return [sys.executable, "-m", "tools.gpu.direct_calls", name, "--device", device]


def _run(context: Context, name: str, env: dict[str, str]) -> NoReturn:
    tool = find_tool("compute-sanitizer")
    line = command(tool or "compute-sanitizer", name, context.device)
    print(" ".join(line), flush=True)
    if context.dry:
        status, text = run_tee(script(name, context.device), env)
        told = f"not run: needs a GPU; its calls without it: {_calls(text)}, status {status}"
        context.row("plain calls", files.OK if status in (0, 5) else files.FAILED, told)
        context.answer(status in (0, 5), told)
    if tool is None:
        context.row(name, files.SKIPPED, "compute-sanitizer is not installed")
        context.answer(False, "not run: compute-sanitizer is not installed")
    status, text = run_tee(line, env)
    verdict, note = judge(status, text)
    context.row(name, verdict, note)
    context.answer(verdict == files.OK, note)


def judge(status: int, text: str) -> tuple[str, str]:
    """A status of correctness.csv and what is to say, of the tool's exit and all that it printed.

    Right is only a run that counted its errors, found none, and made every call.
    """
    found = list(SUMMARY.finditer(text))
    calls = _calls(text)
    if not found:
        return files.FAILED, f"no summary of the tool's, status {status}, {calls}"
    counts = [int(m["errors"] or m["hazards"] or 0) for m in found]
    if any(counts) or status == ERRORS:
        return files.WRONG, f"{max(counts)} reported, see the log; {calls}"
    if status != 0:
        reason = re.search(r"^(?:refused|failed): .*", text, re.M)
        words = reason[0] if reason else "it ended early"
        return files.FAILED, f"{calls}, status {status}: {words}"
    return files.OK, f"none reported, {calls}"


def _calls(text: str) -> str:
    done = re.search(rf"{DONE} (\d+)", text)
    begun = text.count("direct call: ")
    return f"{done[1] if done else 'not all'} of {begun} calls made"


def run_tee(line: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a command; what it prints comes out here at once, and back as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "output")
        with copy.open("wb") as out:
            child = subprocess.Popen(
                line, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert child.stdout is not None
            for part in child.stdout:
                out.write(part)
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
        return child.wait(), copy.read_text(errors="replace")
