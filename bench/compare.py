"""Two result files, case by case: what became faster, what slower, what only looks so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.report import seconds


@dataclass(frozen=True)
class Change:
    """One provider in one case in both files; `clear` when the p20-p80 spans do not overlap."""

    case: str
    provider: str
    before: float
    after: float
    clear: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """Every (case, provider) timed in both, in the order of `a`."""
    after = {_key(row): row for row in b["rows"] if row["p50"] is not None}
    found = []
    for row in a["rows"]:
        other = after.get(_key(row))
        if row["p50"] is None or other is None:
            continue
        clear = row["p80"] < other["p20"] or other["p80"] < row["p20"]
        found.append(Change(row["case"], row["provider"], row["p50"], other["p50"], clear))
    return found


def only_in_one(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What lost its time from `a` to `b` (a wrong result, a refusal), and what gained one."""
    before, after = (
        {_key(r): r["status"] for r in doc["rows"] if r["p50"] is not None} for doc in (a, b)
    )
    status = {_key(r): r["status"] for r in b["rows"]}
    lost = [f"{c} {p} ({status.get((c, p), 'absent')})" for c, p in before if (c, p) not in after]
    return lost, [f"{c} {p}" for c, p in after if (c, p) not in before]


def machines_differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """What differs between the machines: times then compare machines, not code."""
    fields = ("cpu", "threads", "device", "gpu", "versions")
    return [
        f"{f}: {a['machine'][f]} / {b['machine'][f]}"
        for f in fields
        if a["machine"][f] != b["machine"][f]
    ]


def table(found: list[Change]) -> Table:
    """Before and after, the clear changes marked."""
    out = Table(title="p50 before and after", title_justify="left")
    out.add_column("case", overflow="fold")
    for heading in ("provider", "before", "after", "after / before", ""):
        out.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for c in found:
        verdict = "" if not c.clear else ("faster" if c.ratio < 1 else "slower")
        style = {"faster": "green", "slower": "red"}.get(verdict, "")
        out.add_row(
            c.case,
            c.provider,
            seconds(c.before),
            seconds(c.after),
            f"{c.ratio:.2f}",
            verdict,
            style=style,
        )
    return out


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["case"], row["provider"]
