"""What `bench traffic` prints and writes: tables, bounds, a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lora_kernels.ops.common.strategies import STRATEGIES
from tools.gpu_proofs.baselines import baselines
from tools.gpu_proofs.traffic import Counts, Part, Traffic
from tools.gpu_proofs.workloads import Workload
from tools.records import write_atomic

_HEADINGS = (
    "launches",
    "unique",
    "asked",
    "sectors",
    "eff",
    "B/lane ld",
    "B/lane st",
    "conflicts",
    "MMA/needed",
    "atomics",
    "instr/out",
    "error",
)


def _cells(counts: Counts, t: Traffic) -> list[str]:
    floor, flops = t.workload.floor, t.workload.flops
    return [
        str(counts.launches),
        *(f"{v / floor:.3f}" for v in (counts.unique, counts.asked, counts.sectors)),
        f"{counts.efficiency:.3f}",
        *(f"{b / n:.1f}" if n else "" for b, n in (counts.loads, counts.stores)),
        f"{counts.conflicts / counts.accesses:.3f}" if counts.accesses else "",
        f"{counts.flops / flops:.3f}" if flops else "",
        str(counts.atomics),
        f"{counts.instructions / t.workload.outputs:.1f}" if counts.instructions else "",
    ]


def table(found: list[Traffic]) -> Table:
    """One op on one target by each strategy, a row a kernel, beside what others do."""
    workload = found[0].workload
    z = workload.sizes
    sizes = " ".join(f"{n}={v}" for n, v in (("M", z.m), ("N", z.n), ("K", z.k), ("r", z.r)) if v)
    title = f"{workload.name} {sizes} bf16 p={workload.dropout} {found[0].target}"
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("strategy / kernel", no_wrap=True)
    result.add_column("tile", no_wrap=True)
    for heading in _HEADINGS:
        result.add_column(heading, justify="right", no_wrap=True)
    for t in found:
        worst = max(t.error.values(), default=0.0)
        cells = _cells(t.whole, t)
        result.add_row(t.strategy or "one way", "", *cells, f"{worst:.2f}", style="bold")
        for part in t.parts:
            name = f"  {part.name}{' (modelled)' if part.modelled else ''}"
            result.add_row(name, part.tile, *_cells(part.counts, t), "")
    for baseline in baselines(z, workload.name, workload.dropout > 0):
        asked = "" if baseline.requested is None else f"{baseline.requested:.1f}"
        error = "" if baseline.error is None else f"{baseline.error:.1f}"
        cells = [
            str(baseline.launches),
            f"{baseline.unique:.2f}",
            asked,
            *[""] * 6,
            baseline.atomics,
            "",
        ]
        result.add_row(baseline.name, baseline.source.split(":")[0], *cells, error, style="dim")
    return result


@dataclass(frozen=True)
class Bound:
    """A promise about a figure of a whole op or of each of its kernels."""

    name: str
    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


# By the workload's name and the strategy.
_UNIQUE = {
    ("forward", "single_pass"): 1.02,
    ("forward", "epilogue"): 1.36,
    ("backward", "single_pass"): 1.27,
    ("backward", "epilogue"): 1.27,
    ("packed forward", "single_pass"): 1.05,
    ("nf4 dequantise plain", ""): 1.05,
    ("nf4 dequantise nested", ""): 1.05,
    ("gather decode r=8-64", ""): 1.02,
}
_ASKED = {
    **{("forward", s): 5.0 for s in STRATEGIES},
    ("nf4 dequantise plain", ""): 1.05,
    ("nf4 dequantise nested", ""): 1.05,
    ("gather decode", ""): 1.3,
    ("gather decode r=64", ""): 1.15,
    ("gather decode r=8-64", ""): 1.3,
    ("gather prefill", ""): 1.15,
}
_SECTORS = {("gather decode", ""): 1.3, ("gather decode r=64", ""): 1.2}
_LAUNCHES = {
    ("forward", "single_pass"): 1,
    **{("backward", s): 4 for s in STRATEGIES},
    ("packed forward", "single_pass"): 1,
    ("nf4 dequantise plain", ""): 1,
    ("nf4 dequantise nested", ""): 1,
    ("gather decode", ""): 2,
    ("gather decode r=64", ""): 2,
    ("gather decode r=8-64", ""): 2,
}
# A token alone is one of the 16 rows of a tensor core's product.
_PADDING = {name: 16.0 for name in ("gather decode", "gather decode r=64", "gather decode r=8-64")}
_INSTRUCTIONS = {("nf4 dequantise plain", ""): 8.0, ("nf4 dequantise nested", ""): 8.0}


def reached(t: Traffic) -> Iterator[tuple[str, float, Bound]]:
    """Each promise about a traffic: whom it is about, the figure and its bound."""
    whole, workload = t.whole, t.workload
    who, key = t.strategy or workload.name, (workload.name, t.strategy)
    for limits, name, value in (
        (_UNIQUE, "unique / floor", t.over_floor(whole.unique)),
        (_LAUNCHES, "launches", whole.launches),
        (_ASKED, "asked / floor", t.over_floor(whole.asked)),
        (_SECTORS, "sectors / floor", t.over_floor(whole.sectors)),
        (_INSTRUCTIONS, "instructions / output", whole.instructions / workload.outputs),
    ):
        if key in limits:
            yield who, value, Bound(name, limits[key])
    yield who, whole.atomics, Bound("atomics", 0)
    if workload.flops:
        branch = 1.15 if t.strategy != "single_pass" else 1.15 + workload.sizes.r / _block_n(t)
        branch = _PADDING.get(workload.name, branch)
        yield who, whole.flops / workload.flops, Bound("MMA / needed", branch)
    for name, value in t.error.items():
        yield name, value, Bound("error / rounding", 1.5)
    for part in t.parts:
        if part.modelled:
            continue
        c = part.counts
        if c.accesses:
            yield part.name, c.conflicts / c.accesses, Bound("conflicts / access", 0.05)
        yield part.name, c.efficiency, Bound("sector efficiency", 0.95, at_least=True)
        for what, (moved, lanes) in (("loads", c.loads), ("stores", c.stores)):
            if lanes and moved >= 0.1 * c.asked:
                yield part.name, moved / lanes, Bound(f"B/lane of {what}", 15.5, at_least=True)


def _block_n(t: Traffic) -> int:
    tiles = [p.tile for p in t.parts if "BN=" in p.tile]
    return int(tiles[0].split("BN=")[1].split()[0]) if tiles else 1


def misses(t: Traffic) -> list[str]:
    """Promises not kept, in words, with the instructions to look at."""
    head = f"{t.workload.name} p={t.workload.dropout} {t.target} {t.strategy}".rstrip()
    found = [
        f"{head}: {who}: {bound.name} {value:.3f}, "
        f"target {'>=' if bound.at_least else '<='} {bound.limit:.3g}"
        for who, value, bound in reached(t)
        if not bound.holds(value)
    ]
    return found + [f"    {line}" for line in dict.fromkeys(map(str, t.lines))] if found else []


def rows(found: list[Traffic]) -> Iterator[dict[str, Any]]:
    """Every figure, a line a kernel and one a whole op."""
    for t in found:
        whole = Part("whole", "", t.whole)
        for part in (whole, *t.parts):
            values = dict(zip(_HEADINGS, _cells(part.counts, t), strict=False))
            errors = " ".join(f"{n}={v:.3f}" for n, v in t.error.items())
            yield {
                **_key(t.workload),
                "target": t.target,
                "way": t.strategy,
                "kernel": part.name,
                "tile": part.tile,
                "source": "modelled" if part.modelled else "counted",
                **values,
                "error": errors if part is whole else "",
            }
    for workload in {tuple(_key(t.workload).values()): t.workload for t in found}.values():
        for baseline in baselines(workload.sizes, workload.name, workload.dropout > 0):
            yield {
                **_key(workload),
                "way": baseline.name,
                "kernel": "whole",
                "source": baseline.source,
                "launches": baseline.launches,
                "unique": f"{baseline.unique:.3f}",
                "asked": baseline.requested,
                "atomics": baseline.atomics,
                "error": baseline.error,
            }


def _key(s: Workload) -> dict[str, Any]:
    z = s.sizes
    return {"op": s.name, "M": z.m, "N": z.n, "K": z.k, "r": z.r, "dropout": s.dropout}


def save(path: Path, lines: list[dict[str, Any]], constant: dict[str, str]) -> None:
    """Write a CSV file; the first line has every column."""
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(text, [*columns, *constant], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({**line, **constant} for line in lines)
    write_atomic(path, text.getvalue())
