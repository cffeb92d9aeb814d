"""Nsight Compute on four calls: what the hardware counts. Clocks are left as they are."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tools.gpu import files
from tools.gpu.context import Context, find_tool
from tools.gpu.steps.sanitizer import run_tee, script
from tools.records import write_atomic

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis")
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum")


def command(tool: str, log: Path, device: str) -> list[str]:
    options = ["--clock-control", "none", "--profile-from-start", "off"]
    options += ["--target-processes", "all", "--csv", "--page", "raw", "--print-units", "base"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    options += ["--metrics", ",".join(METRICS), "--log-file", str(log)]
    return [tool, *options, *script("profile", device)]


def run(context: Context) -> None:
    target = context.work / files.NCU
    tool = find_tool("ncu")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "ncu.txt")
        line = command(tool or "ncu", log, context.device)
        print(" ".join(line), flush=True)
        if context.dry:
            status, _ = run_tee(script("profile", context.device), {})
            write_atomic(target, '"not run: needs a GPU"\n')
            context.answer(status == 0, f"not run: needs a GPU; its calls ran, status {status}")
        if tool is None:
            write_atomic(target, '"not run: ncu is not installed"\n')
            context.answer(False, "not run: ncu is not installed")
        # Its lock file lies in the temporary folder of whoever ran it first.
        status, _ = run_tee(line, {"TMPDIR": folder})
        text = log.read_text(errors="replace") if log.exists() else ""
    table = [row for row in text.splitlines() if row.startswith('"')]
    print("\n".join(row for row in text.splitlines() if not row.startswith('"')), flush=True)
    write_atomic(target, "\n".join(table) + "\n" if table else '"ncu gave no table"\n')
    kernels = max(0, len(table) - 2)  # names and units stand first
    context.answer(status == 0 and kernels > 0, f"{kernels} kernels, ncu's status {status}")
