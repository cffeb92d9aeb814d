"""What Linux tells about the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def cpuinfo(field: str) -> str:
    """A field of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def cpu_model() -> str:
    """The processor's name, with family and model where there are such: hypervisors hide names."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = cpuinfo("cpu family"), cpuinfo("model")
    return f"{name} (family {family}, model {model})" if model else name
