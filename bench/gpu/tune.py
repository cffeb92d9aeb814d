"""Which strategy and tile of the Triton LoRA products is fastest on this GPU.

Every strategy with every tile that may run is checked and timed beside what the cost model takes,
which is replaced only where another is clearly faster. `measurer.py` does the measuring.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as Grid

from bench.gpu.measurer import Candidate, Measurer, Point, Shape, Timing
from bench.machine import describe, summary
from bench.report import console, seconds
from bench.runner import OK, Settings, paired_ratio
from bench.timing import percentile
from bench.tune import LEAST_GAIN
from lora_kernels.ops.common.configs import GEMM_CONFIGS, Device
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import OPS
from lora_kernels.ops.common.strategies import explain_config
from lora_kernels.ops.common.tuned import FORMAT, Entry, Key, triton_version
from tools.gpu_proofs.commands import shape_of
from tools.records import commit, write_atomic

SECONDS = 0.2  # of each candidate at each point
# A token, a few, and training batches on the attention and MLP layers of 7B models.
SHAPES: tuple[Shape, ...] = tuple(
    (m, n, k, 16)
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))
    for m in (1, 16, 128, 2048, 8192)
)
DROPOUTS = (0.0, 0.1)
SHOWN = 5  # of the fastest ways

# Checks and times candidates of one point in the same rounds; their timings in the order given.
Measure = Callable[[Point, Sequence[Candidate]], list[Timing]]


@dataclass
class Found:
    """What became of a point. `entry` is None where the cost model's choice stays; `ratio` is the
    time of what was chosen over the model's, None where that gave no right result."""

    point: Point
    model: Candidate
    timings: list[Timing]
    entry: Entry | None = None
    ratio: float | None = None

    @property
    def chosen(self) -> Candidate:
        e = self.entry
        return self.model if e is None else Candidate(e.strategy, e.config)


def points(shapes: Sequence[Shape] = SHAPES) -> list[Point]:
    """Both ops, with and without dropout, over both bases, on each shape.

    Raises:
        ValueError: two shapes share one place in a table.
    """
    found: dict[Key, Point] = {}
    grid = itertools.product(shapes, (False, True), DROPOUTS, OPS)
    for shape, quantised, dropout, op in grid:
        point = Point(op, shape, dropout, quantised)
        other = found.setdefault(point.key, point)
        if other is not point:
            both = " and ".join(",".join(map(str, p.shape)) for p in (other, point))
            raise ValueError(
                f"--shapes: got {both}, expected one up to M={point.key.m} of the same N, K and r"
            )
    return list(found.values())


def candidates(point: Point, device: Device) -> list[Candidate]:
    """What the cost model would take on the device, first, and every other way that may run.

    Raises:
        ValueError: there is none.
    """
    model = replace(device, gpu=None)  # no table is asked
    explanation = explain_config(point.op, point.problem, model)
    chosen = explanation.chosen
    if chosen is None:
        raise ValueError(f"no strategy can run it:\n{explanation}")
    ways = [explanation]
    for tile in GEMM_CONFIGS if device.tiles is None else device.tiles:
        ways.append(explain_config(point.op, point.problem, replace(model, tiles=(tile,))))
    estimates = [chosen, *(e for way in ways for e in way.estimates if e.refusal is None)]
    return list(dict.fromkeys(Candidate(e.strategy, e.config) for e in estimates))


def tune(
    points: Sequence[Point],
    device: Device,
    measure: Measure,
    tell: Callable[[Found], object] = lambda found: None,
) -> list[Found]:
    """Try every candidate of every point; `tell` hears of each point when it is done."""
    found = []
    for point in points:
        found.append(_try(point, device, measure))
        tell(found[-1])
    return found


def _try(point: Point, device: Device, measure: Measure) -> Found:
    ways = candidates(point, device)
    timings = measure(point, ways)
    found = Found(point, ways[0], timings)
    right = [t for t in timings if t.status == OK]
    if not right:
        return found
    best = min(right, key=lambda t: t.p50)
    if best.candidate == found.model:
        found.ratio = 1.0
    elif timings[0].status != OK:
        found.entry = best.candidate.entry(best.p50)
    else:
        # The fastest of many is partly the luckiest: both again, alone.
        model, again = measure(point, [found.model, best.candidate])
        found.timings += [t for t in (model, again) if t.status != OK]
        ratio = paired_ratio(again.samples, model.samples)
        found.ratio = 1.0
        if ratio is not None and ratio <= 1 - LEAST_GAIN:
            found.entry, found.ratio = best.candidate.entry(again.p50), ratio
    return found


def table(found: Found) -> Grid:
    """The fastest ways of a point, the cost model's, and whatever was not right."""
    out = Grid(title=str(found.point), title_justify="left", title_style="bold")
    out.add_column("strategy", no_wrap=True)
    for heading in ("tile", "p20", "p50", "p80"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("note", overflow="fold")
    ranked = sorted(found.timings, key=lambda t: t.p50)
    for i, t in enumerate(ranked):
        is_model, taken = t.candidate == found.model, t.candidate == found.chosen
        if t.status == OK and i >= SHOWN and not (is_model or taken):
            continue
        note = "the model's choice" if is_model else ""
        if taken and not is_model:
            note = "taken" if found.ratio is None else f"taken: {found.ratio:.3f} × the model's"
        times = [seconds(percentile(t.samples, q)) if t.samples else "" for q in (0.2, 0.5, 0.8)]
        if t.status != OK:
            note = ", ".join(filter(None, (note, f"{t.status}: {t.note}")))
        style = "bold red" if t.status != OK else "bold" if taken else ""
        tile = str(t.candidate.config or "vendor GEMM")
        out.add_row(t.candidate.strategy, tile, *times, note, style=style)
    return out


def save(path: Path, gpu: str, found: Sequence[Found]) -> None:
    """Write the file that `LORA_KERNELS_GPU_TUNING` takes, whole or not at all."""
    doc: dict[str, Any] = {
        "format": FORMAT,
        "gpu": gpu,
        "triton": triton_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "entries": [_entry(f.point, f.entry) for f in found if f.entry is not None],
    }
    write_atomic(path, json.dumps(doc, indent=1) + "\n")


def _entry(point: Point, entry: Entry) -> dict[str, Any]:
    return {**asdict(point.key), "m": point.shape[0], **asdict(entry)}


def run(
    device: torch.device,
    shapes: Sequence[str] | None,
    settings: Settings,
    output: Path,
    measure: Measure | None = None,
    only: str | None = None,
) -> int:
    """The command: tune, print each point, and write the file after each.

    Args:
        device: one that Triton runs on.
        shapes: each "M,N,K,r"; None is `SHAPES`.
        measure: a `Measurer` where not given.
        only: a regular expression that a point's name holds.

    Returns:
        The exit status: 1 when a result was wrong or did not run.

    Raises:
        ValueError: a shape does not fit, the device has no name, or `only` leaves nothing.
    """
    every = points(SHAPES if shapes is None else [shape_of(text) for text in shapes])
    todo = [p for p in every if only is None or re.search(only, str(p))]
    if not todo:
        names = "\n  ".join(map(str, every))
        raise ValueError(f"--only: {only!r} matches none of\n  {names}")
    planned, screen = planned_device(device), console()
    if planned.gpu is None:
        raise ValueError(f"--device: got {str(device)!r}, expected a GPU")
    screen.print(summary(describe(device)), style="bold", highlight=False)
    start, found = time.perf_counter(), []

    def tell(new: Found) -> None:
        found.append(new)
        save(output, planned.gpu or "", found)  # an interrupted run keeps what it has
        screen.print(table(new))
        spent = time.perf_counter() - start
        screen.print(f"[{len(found)}/{len(todo)}] after {spent:.0f} s\n", style="dim")

    tune(todo, planned, measure or Measurer(device, settings), tell)
    taken = sum(f.entry is not None for f in found)
    screen.print(f"{taken} of {len(found)} choices of the cost model replaced", highlight=False)
    screen.print(f"written: {os.path.relpath(output)}", highlight=False)
    bad = [(f, t) for f in found for t in f.timings if t.status != OK]
    for f, t in bad:
        print(f"bench: {f.point}: {t.candidate}: {t.status}: {t.note}", file=sys.stderr)
    return 1 if bad else 0
