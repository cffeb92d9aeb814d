"""The part of the big grids that a run takes.

Tests marked `grid` have thousands of cases together. `--sample 0.1` takes a tenth of each grid, by
a hash of the commit and the case's name: another tenth with every commit, the same one for all
workers. Whatever the fraction, it takes

* a case of every feature: what the mark names, else each value of each parameter;
* every case marked `always`;
* up to four times the fraction of what belongs to a file that the change touches, as long as that
  does not double the run.

A test that walks a grid by itself, because its cases share what is dear, asks the fixture `sample`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
TOUCHED_TIMES = 4.0
# Files whose names do not hold every family that they serve: the C++ kernels of a linear layer.
LINEAR = ("nf4", "lora", "dora", "packed")
SERVES = {
    "csrc/cpu/*lora*": LINEAR,
    "csrc/cpu/*gem[mv]*": LINEAR,
    "csrc/bindings/lora*": LINEAR,
    "csrc/include/*/lora.h": LINEAR,
    "csrc/*nf4_linear*": LINEAR,
    "tests/native/*lora*": LINEAR,
    "tests/native/*nf4_linear*": LINEAR,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        default=os.environ.get("LORA_KERNELS_SAMPLE", "1"),
        metavar="FRACTION",
        help="take this part of the big grids, chosen by the commit (LORA_KERNELS_SAMPLE; 1)",
    )

    parser.addoption(
        "--sample-bare",
        action="store_true",
        help="of the sample only what the commit draws and what is marked `always`: for one more "
        "run of grids whose every feature another run has",
    )


def fraction(config: pytest.Config) -> float:
    """The option's value.

    Raises:
        pytest.UsageError: it is no number from 0 to 1.
    """
    text = config.getoption("--sample")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise pytest.UsageError(f"--sample: got {text!r}, expected a number from 0 to 1")
    return value


def header(config: pytest.Config) -> str:
    """What the report says of the sample."""
    part = fraction(config)
    if part == 1:
        return "grids: every case"
    files = touched_files()
    return (
        f"grids: {part:g} of the cases, chosen by {seed()}; more of what the change touches "
        f"({len(files)} files); LORA_KERNELS_SAMPLE_SEED and LORA_KERNELS_BASE repeat another run's"
    )


def select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the sample leaves out."""
    part = fraction(config)
    if part == 1:
        return
    bare = config.getoption("--sample-bare")
    files = () if bare else touched_files()
    grids: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid"):
            grids[item.nodeid.partition("[")[0]].append(item)
    left_out: set[str] = set()
    for cases in grids.values():
        described = [_describe(item) for item in cases]
        if bare:
            described = [replace(c, features=frozenset()) for c in described]
        left_out |= {c.name for c in described} - choose(described, part, seed(), files)
    if left_out:
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid in left_out])
        items[:] = [i for i in items if i.nodeid not in left_out]


@dataclass(frozen=True)
class Described:
    """A case of a grid, as far as the choice needs it."""

    name: str
    features: frozenset[str]
    family: str | None = None
    file: str = ""
    always: bool = False


def _describe(item: pytest.Item) -> Described:
    marks = list(item.iter_markers("grid"))
    features = {f for mark in marks for f in mark.args}
    if not features and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
        features = {f"{i}: {value}" for i, value in enumerate(item.callspec._idlist)}
    return Described(
        name=item.nodeid,
        features=frozenset(features),
        family=next((m.kwargs["family"] for m in marks if "family" in m.kwargs), None),
        file=item.path.relative_to(ROOT).as_posix() if ROOT in item.path.parents else "",
        always=item.get_closest_marker("always") is not None,
    )


def choose(cases: list[Described], part: float, key: str, files: Iterable[str]) -> set[str]:
    """The names of the cases of one grid that are taken."""
    drawn = {c.name: _draw(key, c.name) for c in cases}
    files = frozenset(files)
    families = touched_families(files)
    touched = {c.name for c in cases if c.family in families or c.file in files}
    share = len(touched) / len(cases) if cases else 0.0
    times = 1 + min(TOUCHED_TIMES - 1, 1 / share) if touched else 1.0

    taken = {c.name for c in cases if c.always}
    covered = {f for c in cases if c.always for f in c.features}
    for case in sorted(cases, key=lambda c: drawn[c.name]):
        wanted = part * (times if case.name in touched else 1.0)
        if drawn[case.name] < wanted or not case.features <= covered:
            taken.add(case.name)
            covered |= case.features
    return taken


def part_of(
    cases: Iterable[T], part: float, key: str, features: Callable[[T], Iterable[object]]
) -> list[T]:
    """A sample of what a test walks by itself, in its order; the cases tell apart by their repr."""
    cases = list(cases)
    if part == 1:
        return cases
    described = [Described(repr(c), frozenset(map(str, features(c)))) for c in cases]
    taken = choose(described, part, key, ())
    return [c for c, d in zip(cases, described, strict=True) if d.name in taken]


def _draw(key: str, name: str) -> float:
    """From 0 to 1, the same on every machine."""
    digest = hashlib.blake2b(f"{key} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@cache
def families() -> tuple[str, ...]:
    """The folders under ops/, but what they share."""
    folders = (ROOT / "lora_kernels" / "ops").iterdir()
    return tuple(sorted(f.name for f in folders if f.is_dir() and f.name[0] not in "_."))


def touched_families(files: Iterable[str]) -> set[str]:
    """The op families that these files belong to; `common` touches no one of them."""
    found: set[str] = set()
    for file in files:
        path = Path(file)
        if path.parts[:2] == ("lora_kernels", "ops") and len(path.parts) > 3:
            found.add(path.parts[2])
        elif path.parts[0] in ("csrc", "tests"):
            found |= {f for f in families() if f in path.stem}
            found |= {f for like, names in SERVES.items() if fnmatch(file, like) for f in names}
    return found - {"common"}


@cache
def seed() -> str:
    """LORA_KERNELS_SAMPLE_SEED, else the commit, else the same word always."""
    return os.environ.get("LORA_KERNELS_SAMPLE_SEED") or _git("rev-parse", "HEAD") or "no commit"


@cache
def touched_files() -> frozenset[str]:
    """Files that differ from LORA_KERNELS_BASE, else from where the branch left origin/main, else
    from the last commit that is a day older than this one; uncommitted ones too."""
    base = os.environ.get("LORA_KERNELS_BASE") or _base()
    return frozenset(_git("diff", "--name-only", base).splitlines()) if base else frozenset()


def _base() -> str:
    head = _git("rev-parse", "HEAD")
    left = _git("merge-base", "HEAD", "origin/main")
    if left and left != head:
        return left
    made = _git("show", "-s", "--format=%ct", "HEAD")
    if not made:
        return ""
    day_before = _git("rev-list", "-1", f"--before={int(made) - 86400}", "HEAD")
    return day_before or _git("rev-parse", "-q", "--verify", "HEAD~1")


def _git(*arguments: str) -> str:
    """What git prints; nothing where it fails, as it does outside a repository."""
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
