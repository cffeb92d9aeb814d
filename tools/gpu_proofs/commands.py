"""`python -m bench traffic` and `resources`: facts about the Triton kernels, without a GPU."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import time
from pathlib import Path

from rich.console import Console

from tools.records import commit

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands to the parser of `python -m bench`."""
    p = commands.add_parser(
        "traffic",
        help="count the bytes that the Triton kernels move by executing their PTX on the CPU",
    )
    p.add_argument(
        "--family", action="append", help="lora, packed, dora, glu, nf4, gather (default: all)"
    )
    p.add_argument("--target", action="append", help="sm_80 or sm_90 (default: both)")
    p.add_argument("--shape", default="1024,1024,1024,16", help="M,N,K,r (default: %(default)s)")
    p.add_argument("--dropout", type=float, action="append", help="default: 0 and 0.1")
    p.add_argument("--strategy", action="append", help="default: each")
    p.add_argument(
        "--own-tile",
        action="store_true",
        help="the tile that the cost model picks for the shape, not for M=8192 N=K=4096",
    )
    p.add_argument("--threads", type=int, default=2, help="of the emulator (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS / "traffic.csv")
    p.set_defaults(command=_traffic)
    p = commands.add_parser(
        "resources",
        help="compile every Triton kernel ahead of time: registers, shared memory, occupancy",
    )
    p.add_argument("--target", action="append", help="sm_80, sm_90, sm_100, gfx942 (default: all)")
    p.add_argument("--only", metavar="REGEX", help="only launches whose label it finds")
    p.add_argument("--output", type=Path, default=RESULTS / "resources.csv")
    p.set_defaults(command=_resources)


def _console() -> Console:
    """Wide enough for the tables, whatever the terminal is."""
    return Console(width=220)


def _constant() -> dict[str, str]:
    """What goes into every line of a result."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns where it is unset
    return {"triton": importlib.metadata.version("triton"), "commit": commit() or ""}


def shape_of(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.strip().isdigit() and int(p) for p in parts):
        raise ValueError(f"shape: got {text!r}, expected M,N,K,r")
    m, n, k, r = map(int, parts)
    return m, n, k, r


def _traffic(args: argparse.Namespace) -> int:
    constant = _constant()
    from tools.gpu_proofs import traffic_table
    from tools.gpu_proofs.traffic import PLANNED, beyond_product, explain, measure, targets_of
    from tools.gpu_proofs.workloads import PLANNED as LAYERS
    from tools.gpu_proofs.workloads import families_of, workloads
    from tools.op_inputs.source import Hollow, Source

    console, source = _console(), Source()
    shape, found, missed = shape_of(args.shape), [], []
    families, targets = families_of(args.family), targets_of(args.target)
    for target in targets:
        for dropout in args.dropout or [0.0, 0.1]:
            start = time.perf_counter()
            planned = {}
            if not args.own_tile:
                layers = [f for f in families if f in LAYERS]
                size = (*PLANNED, shape[3])
                planned = {w.name: w for w in workloads(layers, size, dropout, Hollow())}
            for workload in workloads(families, shape, dropout, source):
                ways = [s for s in args.strategy or workload.strategies if s in workload.strategies]
                at = planned.get(workload.name)
                new = [measure(workload, target, way, at, args.threads) for way in ways]
                if new:
                    console.print(traffic_table.table(new))
                found += new
            console.print(f"counted in {time.perf_counter() - start:.1f} s\n", style="dim")
        if "lora" not in families:
            continue
        for op in ("forward", "backward"):
            for dropout in args.dropout or [0.0, 0.1]:
                explanation = explain(op, shape[3], dropout > 0, target)
                console.print(str(explanation), highlight=False)
                beyond = ", ".join(
                    f"{e.strategy} {beyond_product(e) / 1e6:.1f}"
                    for e in explanation.estimates
                    if e.refusal is None
                )
                console.print(f"  MB beyond the base product: {beyond}\n", highlight=False)
    picked = "this shape" if args.own_tile else "M={} N={} K={}".format(*PLANNED)
    console.print(f"tiles: what the cost model picks for {picked} on the target's device")
    for t in found:
        missed += traffic_table.misses(t)
    console.print("targets missed:" if missed else "every target is met", style="bold")
    for line in missed:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    traffic_table.save(args.output, list(traffic_table.rows(found)), constant)
    console.print(f"written: {os.path.relpath(args.output)}", highlight=False)
    return 0


def _resources(args: argparse.Namespace) -> int:
    constant = _constant()
    from tools.gpu_proofs import cuda_resources, resources, traffic_table

    console = _console()
    lines = []
    for target in resources.targets_of(args.target):
        new = resources.rows(target, args.only) + cuda_resources.rows(target, args.only)
        console.print(resources.table(target, new))
        lines += new
    traffic_table.save(args.output, lines, constant)
    console.print(f"written: {os.path.relpath(args.output)}", highlight=False)
    return 0
