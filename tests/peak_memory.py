"""The peak memory of each test process, at the end of the report: runners have little of it."""

from __future__ import annotations

import resource
from typing import Any

import pytest

_peaks = pytest.StashKey[dict[str, int]]()


def peak_mib() -> int:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the process that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["peak_mib"] = peak_mib()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    peak = getattr(node, "workeroutput", {}).get("peak_mib")
    if peak is not None:
        node.config.stash.setdefault(_peaks, {})[node.gateway.id] = peak


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    peaks = {"this process": peak_mib(), **config.stash.get(_peaks, {})}
    told = ", ".join(f"{name} {peak} MiB" for name, peak in sorted(peaks.items()))
    terminalreporter.write_line(f"peak memory: {told}")
