"""A pytest plugin: writes each test's outcome to correctness.csv as it ends, and ends a process
that has lost its device, so that pytest-xdist starts another one for the tests that are left."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import files
from tools.gpu.worker import lost

STEP, PATH = "LORA_KERNELS_GPU_STEP", "LORA_KERNELS_GPU_ROWS"
_lost = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    if not _works(config):
        config.pluginmanager.register(Leader())


def _works(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes."""
    return hasattr(config, "workerinput")


class Leader:
    """Hears of every test. What passed is counted alone."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        _write(report)


def _write(report: Any) -> None:
    path, step = Path(os.environ[PATH]), os.environ[STEP]
    if report.when == "call" and report.passed:
        _count(path, step, "passed")
    elif report.skipped:
        _count(path, step, "skipped")
    elif report.failed:
        _count(path, step, "failed")
        text = str(report.longrepr)
        assertion = [line[2:].strip() for line in text.splitlines() if line.startswith("E ")]
        wrong = any(a.startswith(("assert ", "AssertionError")) for a in assertion)
        status = files.WRONG if wrong else files.FAILED
        if "crashed while running" in text:
            status = files.DIED
        note = " ".join(assertion[:3]) or text[-500:]
        row = {"step": step, "what": report.nodeid, "status": status, "note": note}
        files.append(path, [{**row, "seconds": f"{report.duration:.1f}"}])


def _count(path: Path, step: str, kind: str) -> None:
    """One letter a test, so that a run that is cut has counted too."""
    with path.with_name(f"{step}.counts").open("a") as file:
        file.write(kind[0])


def counts(path: Path, step: str) -> dict[str, int]:
    """How many passed, were skipped and failed."""
    try:
        text = path.with_name(f"{step}.counts").read_text()
    except OSError:
        text = ""
    return {kind: text.count(kind[0]) for kind in ("passed", "skipped", "failed")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and lost(str(report.longrepr)):
        item.config.stash[_lost] = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    if _works(item.config) and item.config.stash.get(_lost, False):
        os._exit(3)
    return result
