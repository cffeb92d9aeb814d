"""What is written, and how: at most eight files, each line at once, each whole file or nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.records import write_atomic

LOG, SUMMARY, CORRECTNESS = "log.txt", "summary.json", "correctness.csv"
BENCH_JSON, BENCH_CSV, TUNING = "bench.json", "bench.csv", "tuning.json"
NCU, HOST = "ncu.csv", "host.csv"
FILES = (LOG, SUMMARY, CORRECTNESS, BENCH_JSON, BENCH_CSV, TUNING, NCU, HOST)

# Of one call, test or case. `seconds` are a rough wall clock, for finding what took long.
ROW = ("step", "what", "backend", "status", "seconds", "note")
OK, WRONG, FAILED, DIED, HUNG = "ok", "wrong", "failed", "died", "hung"
REFUSED, SKIPPED = "refused", "skipped"
BAD = (WRONG, FAILED, DIED, HUNG)
LONGEST_NOTE = 2000


def append(path: Path, rows: Iterable[Mapping[str, Any]], fields: tuple[str, ...] = ROW) -> None:
    """Add rows to a CSV file in one write each, so that several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.fstat(handle).st_size == 0:
            os.write(handle, (",".join(fields) + "\n").encode())
        for row in rows:
            text = io.StringIO(newline="")
            short = {k: str(row.get(k, ""))[:LONGEST_NOTE] for k in fields}
            csv.DictWriter(text, fields, lineterminator="\n").writerow(short)
            os.write(handle, text.getvalue().encode(errors="replace"))
    finally:
        os.close(handle)


def rows_of(path: Path, step: str | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, of one step or all; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        rows = list(csv.DictReader(line.replace("\0", "") for line in file))
    return [r for r in rows if step is None or r.get("step") == step]


def without(path: Path, step: str) -> None:
    """Take a step's rows away: it begins again."""
    if path.exists():
        kept = [r for r in rows_of(path) if r.get("step") != step]
        write_atomic(path, "")
        append(path, kept)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def publish(work: Path, output: Path) -> None:
    """Copy each of the files that has changed to the output folder, and no others."""
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        source, target = work / name, output / name
        if not source.exists():
            continue
        new, old = source.stat(), target.stat() if target.exists() else None
        if old and (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            continue
        temporary = work / f".{name}.copy"
        shutil.copy2(source, temporary)
        try:
            os.replace(temporary, target)
        except OSError:  # another file system
            beside = target.with_name(f".{name}.copy")
            shutil.copy2(temporary, beside)
            os.replace(beside, target)
            temporary.unlink()
