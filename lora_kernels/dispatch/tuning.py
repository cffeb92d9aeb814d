"""Block sizes of the CPU kernels from the file that `LORA_KERNELS_TUNING` names.

`python -m bench tune` writes such files. Block sizes decide how fast a kernel is and no bit of what
it computes, so a file that does not fit is no error: a warning says why and the defaults stay.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_kernels.dispatch.cpu import cpu_model

VARIABLE = "LORA_KERNELS_TUNING"
FORMAT = 1


def head(module: ModuleType) -> dict[str, Any]:
    """The format and what it was tuned on: a file with another head does not fit."""
    return {"format": FORMAT, "cpu": cpu_model(), "isa": module.current_isa()}


def apply_file(module: ModuleType) -> None:
    """Set the block sizes of the extension `module` from the file, if one is named."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return
    try:
        module.set_tuning(_values(name, head(module)))
    except (OSError, ValueError) as error:
        warnings.warn(f"{VARIABLE}={name}: {error}; the default block sizes stay", stacklevel=2)


def _values(name: str, expected: dict[str, Any]) -> dict[str, Any]:
    doc = json.loads(Path(name).read_text(encoding="utf-8"))
    if not isinstance(doc, dict) or not isinstance(doc.get("values"), dict):
        raise ValueError("holds no block sizes")
    for key, here in expected.items():
        if doc.get(key) != here:
            raise ValueError(f"{key}: got {doc.get(key)!r}, expected {here!r}")
    return doc["values"]
