"""Going on with a run that was cut or whose process died: `python -m bench run --resume`.

The result file names the case that is being run. One that is named there when a run begins has
ended its process; it is tried once more, and then stands in the results as failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from bench import report
from bench.cases import Case
from bench.machine import Limits
from bench.runner import FAILED, Row

TRIES = 2
SAME = ("cpu", "device", "gpu", "threads", "versions", "commit")  # of the machine, or no resuming


@dataclass
class Earlier:
    """What an earlier run of the same cases has left.

    Attributes:
        rows: of the cases that are done.
        limits: what it measured.
        tries: how often each case was begun and not ended, by name.
    """

    rows: list[Row] = field(default_factory=list)
    limits: Limits | None = None
    tries: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> set[str]:
        return {row.case.name for row in self.rows}

    def next(self, cases: Sequence[Case]) -> list[Case]:
        """The cases to run; one that was begun too often is a failed row instead."""
        todo = []
        for case in cases:
            if case.name in self.done:
                continue
            if self.tries.get(case.name, 0) < TRIES:
                todo.append(case)
                continue
            note = f"ended the process, or outran its limit, {TRIES} times"
            self.rows.append(Row(case, "all", FAILED, note))
        return todo

    def begin(self, case: Case) -> None:
        self.tries[case.name] = self.tries.get(case.name, 0) + 1

    def end(self, case: Case) -> None:
        self.tries.pop(case.name, None)


def earlier(path: Path, machine: dict[str, Any]) -> Earlier:
    """What the result file `path`.json holds; nothing where there is no such file.

    Raises:
        ValueError: it was made on another machine, or by other versions.
    """
    path = path.with_suffix("") if path.suffix in (".json", ".csv") else path
    path = path.with_name(path.name + ".json")
    if not path.exists():
        return Earlier()
    doc = report.load(path)
    for key in SAME:
        if doc["machine"].get(key) != machine.get(key):
            raise ValueError(
                f"--resume: {path} has {key} {doc['machine'].get(key)!r}, and here it is "
                f"{machine.get(key)!r}"
            )
    limits = Limits(**doc["limits"]) if doc["limits"] else None
    return Earlier([_row(values) for values in doc["rows"]], limits, doc.get("tries", {}))


def _row(values: dict[str, Any]) -> Row:
    case = Case(**{f.name: values[f.name] for f in fields(Case)})
    own = {f.name: values[f.name] for f in fields(Row) if f.name != "case" and f.name in values}
    return Row(case, **own)
