"""Results on disk (JSON and CSV, each written whole or not at all) and on the screen."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import Limits
from bench.runner import OK, Row, baseline
from tools.records import write_atomic

FORMAT = 1


def document(
    machine: dict[str, Any], settings: dict[str, Any], limits: Limits | None, rows: list[Row]
) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "format": FORMAT,
        "machine": machine,
        "settings": settings,
        "limits": limits.as_dict() if limits else None,
        "rows": [row.as_dict(samples=True) for row in rows],
    }


def save(path: Path, doc: dict[str, Any]) -> tuple[Path, Path]:
    """Write `path`.json, samples included, and `path`.csv, one line a provider and case."""
    path = path.with_suffix("") if path.suffix in (".json", ".csv") else path
    out_json, out_csv = path.with_name(path.name + ".json"), path.with_name(path.name + ".csv")
    write_atomic(out_json, json.dumps(doc, indent=1) + "\n")
    machine = doc["machine"]
    constant = {
        "cpu": machine["cpu"],
        "gpu": (machine["gpu"] or {}).get("name", ""),
        "threads": machine["threads"],
        "torch": machine["versions"].get("torch", ""),
        "commit": machine["commit"] or "",
    }
    rows = [{**{k: v for k, v in row.items() if k != "samples"}, **constant} for row in doc["rows"]]
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomic(out_csv, text.getvalue())
    return out_json, out_csv


def load(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a result file of this format.
    """
    try:
        doc = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a result file: {error}") from error
    if not isinstance(doc, dict) or doc.get("format") != FORMAT:
        raise ValueError(f"{path}: not a result file of format {FORMAT}")
    return doc


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(value: int | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def case_table(rows: list[Row]) -> Table:
    """The providers of one case; no time of a result that is not right."""
    case = rows[0].case
    title = f"{case.name} (into a fresh tensor)" if case.fresh else case.name
    table = Table(title=title, title_justify="left", title_style="bold")
    base = baseline(case)
    headings = ["p20", "p50", "p80", "rounds"]
    headings += [
        f"× {base}",
        "× floor",
        "TFLOP/s",
        "of GEMM",
        "GB/s",
        "of read",
        "peak",
        "saved",
    ]
    table.add_column("provider", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for r in rows:
        if r.status != OK:
            style = "dim" if r.status == "refused" else "bold red"
            table.add_row(r.provider, *("" for _ in headings), f"{r.status}: {r.note}", style=style)
            continue
        table.add_row(
            r.provider,
            seconds(r.p20),
            seconds(r.p50),
            seconds(r.p80),
            f"{r.rounds}{' g' if r.graph else ''}{' h' if r.waited else ''}",
            "" if r.ratio is None else f"{r.ratio:.2f}",
            "" if r.over_floor is None else f"{r.over_floor:.2f}",
            "" if r.flops_per_s is None else f"{r.flops_per_s / 1e12:.3g}",
            _percent(r.of_gemm),
            "" if r.bytes_per_s is None else f"{r.bytes_per_s / 1e9:.3g}",
            _percent(r.of_bandwidth),
            size(r.peak_bytes),
            size(r.saved_bytes),
            r.note,
            style="bold" if r.provider.startswith("ours") else "",
        )
    return table


def console(*, stderr: bool = False) -> Console:
    """A console wide enough for the tables when the output is no terminal."""
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal else Console(stderr=stderr, width=170)
