"""Memory of this process, read from the system."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

MIB = 1 << 20


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def resident_bytes() -> int:
    """Memory that the process holds now, or its peak on systems that report only that."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """The most memory that the process has held since it began, or since `reset_peak`."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def reset_peak() -> None:
    """Start measuring the peak from now (Linux; elsewhere it keeps counting from the start)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
