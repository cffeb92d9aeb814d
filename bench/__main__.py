"""`python -m bench run | verify | tune | plot | compare | targets | traffic | resources`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from bench import compare, report, resume, targets, tune
from bench.cases import BOTH, FWD, WHOLE, Case
from bench.gpu import tune as gpu_tune
from bench.machine import Limits, describe, measure_limits, summary
from bench.model_suite import KINDS, Choice
from bench.providers import PROVIDERS, Provider, select
from bench.runner import FAILED, OK, WRONG, Row, Settings, derive, run_case
from bench.suites import SUITES, TINY, kind, suite
from tools.gpu_proofs import commands as gpu_commands

# Of whole models: rounds, and seconds of all providers together for each of `--seconds`.
MODEL_ROUNDS, MODEL_SECONDS = 9, 80
# What of the arguments a result file quotes.
COMMAND = ("suite", "only", *(f.name for f in fields(Choice)), "providers", "device", "threads")
COMMAND += ("seconds",)
RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 1 when a result is wrong or ours fails; 2 for arguments that do not fit."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def threads(p: argparse.ArgumentParser) -> None:
        p.add_argument("--threads", type=int, help="CPU threads (default: torch's own number)")

    def selecting(p: argparse.ArgumentParser) -> None:
        p.add_argument("--only", metavar="REGEX", help="only cases whose name it finds")
        for name in ("model", "layer"):
            p.add_argument(f"--{name}", nargs="+", default=[], help=f"only cases of such a {name}")
        p.add_argument("--tokens", nargs="+", type=int, default=[], help="only these M")
        p.add_argument("--kind", nargs="+", default=[], choices=KINDS, help="only these kinds")
        p.add_argument("--direction", nargs="+", default=[], choices=(FWD, BOTH))

    def measuring(name: str, help: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=help)
        p.add_argument("--suite", default="quick", choices=SUITES)
        selecting(p)
        names = ", ".join(p.name for p in PROVIDERS)
        p.add_argument(
            "--providers",
            metavar="REGEX",
            help=f"only providers whose name it matches from the start ({names})",
        )
        p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
        threads(p)
        p.add_argument(
            "--peer-python",
            metavar="PATH",
            help="of whole models: an interpreter with the peers that are not installed here",
        )
        p.add_argument("--rotate-mib", type=int, default=1024, help="default: %(default)s")
        return p

    run = measuring(
        "run",
        "check every provider, then time the right ones; quantisers and decoders into a fresh "
        "tensor, whose pages the system has to provide first",
    )
    run.add_argument("--seconds", type=float, default=Settings.seconds, help="of each provider")
    run.add_argument(
        "--rounds", type=int, default=Settings.min_rounds, help="at least (default: %(default)s)"
    )
    run.add_argument("--output", type=Path, help="default: bench/results/<device>-<suite>")
    run.add_argument("--resume", action="store_true", help="go on with the file at --output")
    run.set_defaults(command=_run)
    verify = measuring("verify", "check every provider and time nothing")
    verify.set_defaults(command=_verify, output=None, resume=False)

    p = commands.add_parser(
        "tune",
        help="find the CPU kernels' fastest block sizes on this machine and write them to a file, "
        "which LORA_KERNELS_TUNING=FILE puts in force; minutes. With --device cuda the Triton "
        "kernels' strategies and tiles, for LORA_KERNELS_GPU_TUNING=FILE",
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    threads(p)
    p.add_argument(
        "--shapes",
        nargs="+",
        metavar="M,N,K,r",
        help="only with --device cuda (default: layers of 7B models)",
    )
    p.add_argument(
        "--only", metavar="REGEX", help="with --device cuda: only points whose name it finds"
    )
    p.add_argument(
        "--seconds", type=float, help="of each value in each case (default: 1.5, on a GPU 0.2)"
    )
    p.add_argument("--output", type=Path, help="default: tuning.json, of a GPU gpu-tuning.json")
    p.set_defaults(command=_tune)
    p = commands.add_parser("plot", help="draw a result file as PNG")
    p.add_argument("results", type=Path)
    p.add_argument("--output", type=Path, help="folder (default: beside the results)")
    p.set_defaults(command=_plot)
    p = commands.add_parser("compare", help="two result files, case by case")
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.set_defaults(command=_compare)
    p = commands.add_parser("targets", help="what this package promises and what a run reached")
    p.add_argument("results", type=Path)
    p.set_defaults(command=_targets)
    p = commands.add_parser("list", help="name the cases of a suite")
    p.add_argument("--suite", default="quick", choices=SUITES)
    selecting(p)
    p.set_defaults(command=_list)
    gpu_commands.add(commands)
    return parser


def _set_up(args: argparse.Namespace) -> tuple[torch.device, list[Case], list[Provider]]:
    device = _device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams and events the stopwatch uses
    _set_threads(args)
    return device, _cases(args), select(args.providers, kind(args.suite))


def _narrowed(args: argparse.Namespace) -> bool:
    return bool(args.only) or any(getattr(args, f.name) for f in fields(Choice))


def _cases(args: argparse.Namespace) -> list[Case]:
    return suite(
        args.suite, args.only, Choice(**{f.name: getattr(args, f.name) for f in fields(Choice)})
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:  # no such kind of device
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {name!r}, but this torch sees no CUDA device")
    return device


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads is None:
        return
    if args.threads < 1:
        raise ValueError(f"threads: got {args.threads}, expected 1 or more")
    torch.set_num_threads(args.threads)


def _measure(args: argparse.Namespace, settings: Settings, *, verify_only: bool) -> int:
    device, cases, providers = _set_up(args)
    console = report.console()
    machine = describe(device)
    console.print(summary(machine), style="bold", highlight=False)
    output = _output(args, device)
    before = resume.earlier(output, machine) if args.resume else resume.Earlier()
    limits = None if verify_only else _limits(args, device, cases)
    if limits is not None:
        limits = limits if before.limits is None else limits.best(before.limits)
        console.print(f"limits here and now: {limits}\n", highlight=False)
    todo, rows = before.next(cases), before.rows

    def save() -> list[Path]:
        doc = report.document(machine, _settings(args, settings), limits, rows)
        return list(report.save(output, {**doc, "tries": before.tries}))

    for i, case in enumerate(todo, 1):
        start = time.perf_counter()
        before.begin(case)
        if limits is not None:
            save()
        new = _run_one(case, providers, args, device, settings, limits, verify_only)
        before.end(case)
        rows += new
        if new:
            console.print(report.case_table(new))
        console.print(
            f"[{i}/{len(todo)}] {case.name}: {time.perf_counter() - start:.1f} s\n", style="dim"
        )
        if limits is not None:
            save()  # after every case: an interrupted run keeps what it has
    if limits is not None and rows:
        # Measured again at the end: whatever else ran at the start must not lower the bar.
        limits = limits.best(_limits(args, device, cases))
        for row in rows:
            derive(row, limits)
        console.print(f"limits, the best of start and end: {limits}", highlight=False)
        paths = save()
        console.print("written: " + ", ".join(os.path.relpath(p) for p in paths), highlight=False)
        if args.suite in ("targets", "full", "models"):
            for table in targets.of_suite(report.load(paths[0]), measured=_narrowed(args)):
                console.print(table)
    return _status(rows)


def _limits(args: argparse.Namespace, device: torch.device, cases: list[Case]) -> Limits:
    dtypes = sorted({c.dtype for c in cases})
    if args.suite in TINY:
        return measure_limits(device, dtypes, buffer_bytes=1 << 22, gemm_size=256)
    return measure_limits(device, dtypes, gemm_size=8192 if device.type == "cuda" else 4096)


def _run_one(
    case: Case,
    providers: list[Provider],
    args: argparse.Namespace,
    device: torch.device,
    settings: Settings,
    limits: Limits | None,
    verify_only: bool,
) -> list[Row]:
    if case.op in WHOLE:
        from bench.step import run_model

        return run_model(
            *(case, device, args.providers),
            rounds=max(settings.min_rounds, MODEL_ROUNDS),
            seconds=MODEL_SECONDS * settings.seconds,
            verify_only=verify_only,
            python=args.peer_python,
            tell=report.console(stderr=True).print,
        )
    return run_case(case, providers, device, settings, limits, verify_only=verify_only)


def _status(rows: list[Row]) -> int:
    """1 when any result is wrong, or one of ours raised something other than a refusal."""
    wrong = [r for r in rows if r.status == WRONG]
    broken = [r for r in rows if r.status == FAILED and r.provider.startswith("ours")]
    for row in wrong + broken:
        print(f"bench: {row.case.name}: {row.provider}: {row.status}: {row.note}", file=sys.stderr)
    counts = {s: sum(r.status == s for r in rows) for s in sorted({r.status for r in rows} | {OK})}
    print(", ".join(f"{n} {s}" for s, n in counts.items()))
    return 1 if wrong or broken else 0


def _output(args: argparse.Namespace, device: torch.device) -> Path:
    if args.output is not None:
        return args.output
    if device.type == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    else:
        name = f"cpu-{torch.get_num_threads()}t"
    return RESULTS / f"{name}-{args.suite}"


def _settings(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    command = "python -m bench run " + " ".join(
        f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
        for k, v in vars(args).items()
        if k in COMMAND and v not in (None, [])
    )
    return {**asdict(settings), "suite": args.suite, "command": command}


def _run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise ValueError(f"rounds: got {args.rounds}, expected 1 or more")
    settings = Settings(
        seconds=_seconds(args), min_rounds=args.rounds, rotate_bytes=args.rotate_mib << 20
    )
    return _measure(args, settings, verify_only=False)


def _seconds(args: argparse.Namespace) -> float:
    if args.seconds <= 0:
        raise ValueError(f"seconds: got {args.seconds}, expected more than 0")
    return float(args.seconds)


def _verify(args: argparse.Namespace) -> int:
    # Two copies: the second stands for the others.
    return _measure(args, Settings(rotate_bytes=1), verify_only=True)


def _tune(args: argparse.Namespace) -> int:
    device = _device(args.device)
    if args.seconds is None:
        args.seconds = gpu_tune.SECONDS if device.type == "cuda" else Settings.seconds
    settings = Settings(seconds=_seconds(args))
    _set_threads(args)
    if device.type == "cuda":
        with torch.cuda.device(device):
            return gpu_tune.run(
                device,
                args.shapes,
                settings,
                args.output or Path("gpu-tuning.json"),
                only=args.only,
            )
    for name in ("shapes", "only"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: given with --device cpu, expected --device cuda")
    output = args.output or Path("tuning.json")
    console = report.console()
    console.print(summary(describe(torch.device("cpu"))), style="bold", highlight=False)
    found = tune.tune(settings, tune.CASES, tell=lambda t: console.print(tune.table(t)))
    tune.save(output, found)
    for name, value in found.values.items():
        console.print(f"{name} = {value}: {found.gains[name]:.1%} less time", highlight=False)
    together = found.gains.get("all")
    if together is not None:
        console.print(f"together: {together:.1%} less time", highlight=False)
    console.print(f"written: {os.path.relpath(output)}", highlight=False)
    return _status(found.rows)


def _plot(args: argparse.Namespace) -> int:
    from bench.plot import plot

    doc = report.load(args.results)
    for path in plot(doc, args.output or args.results.parent, args.results.stem):
        print(os.path.relpath(path))
    return 0


def _compare(args: argparse.Namespace) -> int:
    a, b = report.load(args.before), report.load(args.after)
    console = report.console()
    for line in compare.machines_differ(a, b):
        console.print(f"differs: {line}", style="yellow", highlight=False)
    found = compare.changes(a, b)
    if not found:
        raise ValueError("the two files have no timed case and provider in common")
    console.print(compare.table(found))
    lost, gained = compare.only_in_one(a, b)
    for line in lost:
        console.print(f"no longer timed: {line}", style="red", highlight=False)
    for line in gained:
        console.print(f"timed now: {line}", highlight=False)
    return 0


def _targets(args: argparse.Namespace) -> int:
    doc = report.load(args.results)
    console = report.console()
    console.print(summary(doc["machine"]), style="bold", highlight=False)
    for table in targets.of_suite(doc):
        console.print(table)
    return 0


def _list(args: argparse.Namespace) -> int:
    for case in _cases(args):
        print(case.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
