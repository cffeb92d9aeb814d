"""What one GPU says of this package: is it right (phase A), how fast is it (phase B)?

A second run with the same sources, versions and device goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.gpu import files
from tools.gpu.context import ROOT, find_tool
from tools.gpu.plan import PHASES, steps
from tools.gpu.run import Runner, fresh
from tools.gpu.state import State, identity

SAMPLE = 0.05
DRY_LIMIT = 1200.0  # seconds of a phase: two slow cores take some 120 for both
GIB_A_PROCESS = 8  # the largest call beside its fp64 twin
STATUS = (
    "exit status: 0 all is well; 1 something is wrong; 2 arguments; 3 time ran out, run again; "
    "4 nothing can be measured here"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu", description=__doc__, epilog=STATUS)
    parser.add_argument("--phase", choices=(*PHASES, "all"), default="all")
    parser.add_argument("--device", help="cuda, cuda:1, ... (default: cuda)")
    parser.add_argument(
        "--dry-run", action="store_true", help="every line, on tiny shapes, on the CPU"
    )
    parser.add_argument("--output", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--work", type=Path, help="default: build/gpu/<device>")
    parser.add_argument(
        "--processes", type=int, help="default: all cores but two, as memory allows"
    )
    parser.add_argument("--sample", type=float, default=SAMPLE, help="of the parity grid")
    parser.add_argument(
        "--limit", type=float, help="seconds of a phase (default: A 330, B 300; steps grow with it)"
    )
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--fresh", action="store_true", help="forget what is done already")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except ValueError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    todo = steps(args.phase, args.only)
    if args.list:
        for step in todo:
            print(f"{step.phase}  {step.name:<12}{step.limit:>4.0f} s  {step.says}")
        return 0
    device = args.device or ("cpu" if args.dry_run else "cuda")
    _check(args, device)
    name, gigabytes = ("dry-run", None) if args.dry_run else _gpu(device)
    work = args.work or ROOT / "build" / "gpu" / name
    output = args.output or (work / "results" if args.dry_run else ROOT / "bench/results" / name)
    work, output = work.resolve(), output.resolve()
    of = identity(name, args.dry_run)
    state = None if args.fresh else State.load(work / files.SUMMARY, of)
    if state is None:
        fresh(work)
        state = State(work / files.SUMMARY, of)
    seconds = args.limit or (DRY_LIMIT if args.dry_run else None)
    limits = dict.fromkeys(PHASES, seconds) if seconds else dict(PHASES)
    processes = args.processes or _processes(gigabytes)
    os.chdir(ROOT)
    return Runner(
        todo, state, device, work, output, processes, args.sample,
        args.dry_run, limits,
    ).run()  # fmt: skip


def _check(args: argparse.Namespace, device: str) -> None:
    if args.dry_run and device != "cpu":
        raise ValueError(f"--device: got {device!r}, expected cpu with --dry-run")
    if not args.dry_run and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(
            f"--device: got {device!r}, expected cuda or cuda:N; --dry-run tries every step on "
            "the CPU"
        )
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes: got {args.processes}, expected 1 or more")
    if not 0 < args.sample <= 1:
        raise ValueError(f"--sample: got {args.sample}, expected more than 0, at most 1")
    if args.limit is not None and args.limit <= 0:
        raise ValueError(f"--limit: got {args.limit}, expected more than 0")


def _gpu(device: str) -> tuple[str, float | None]:
    """A folder's name and GiB of memory. Asked of the driver: this process never touches the
    device."""
    found, index = "", device.partition(":")[2] or "0"
    tool = find_tool("nvidia-smi")
    if tool is not None:
        query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits", "-i", index]
        try:
            found = subprocess.run(
                [tool, *query], text=True, stdout=-1, stderr=subprocess.DEVNULL, timeout=20
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            found = ""
    answer = re.fullmatch(r"(.+), *(\d+)\s*", found)
    if answer is None:
        return device.replace(":", "-"), None
    name = re.sub(r"[^a-z0-9]+", "-", answer[1].lower()).strip("-")
    return name, int(answer[2]) / 1024


def _processes(gigabytes: float | None) -> int:
    """All cores but two; each process may take some GiB of the device."""
    cores = max(1, (os.cpu_count() or 1) - 2)
    return cores if gigabytes is None else max(1, min(cores, int(gigabytes / GIB_A_PROCESS)))


if __name__ == "__main__":
    sys.exit(main())
