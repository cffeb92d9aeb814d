"""Block sizes of the CPU kernels from the file that `LORA_KERNELS_TUNING` names.

`python -m bench tune` writes such files; those for GPUs `ops/common/tuned.py` reads. Tuning decides
how fast a kernel is and not whether it is right, so a file that does not fit is no error: a warning
says why and the defaults stay.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lora_kernels.dispatch.cpu import cpu_model

VARIABLE = "LORA_KERNELS_TUNING"
FORMAT = 1
T = TypeVar("T")


def from_file(variable: str, take: Callable[[str, Any], T], instead: str) -> T | None:
    """Read the JSON file that an environment variable names and return what `take` makes of the
    file's name and content. Returns None if the variable is not set, and None with a warning if the
    file does not fit.

    Args:
        take: raises ValueError, which says what it found and what it expected.
        instead: what happens then, for the warning.
    """
    name = os.environ.get(variable, "")
    if not name:
        return None
    try:
        return take(name, json.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        warnings.warn(f"{variable}={name}: {error}; {instead}", stacklevel=3)
        return None


def check_head(doc: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first key whose value is not the expected one."""
    for key, here in expected.items():
        if doc.get(key) != here:
            raise ValueError(f"{key}: got {doc.get(key)!r}, expected {here!r}")


def head(module: ModuleType) -> dict[str, Any]:
    """The format, and what the file was tuned on. A file with other values is refused."""
    return {"format": FORMAT, "cpu": cpu_model(), "isa": module.current_isa()}


def apply_file(module: ModuleType) -> None:
    """Set the block sizes of the extension `module` from the file, if one is named."""

    def take(name: str, doc: Any) -> None:
        if not isinstance(doc, dict) or not isinstance(doc.get("values"), dict):
            raise ValueError("holds no block sizes")
        check_head(doc, head(module))
        module.set_tuning(doc["values"])

    from_file(VARIABLE, take, "the default block sizes stay")
