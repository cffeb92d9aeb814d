"""Whether the compiled extension belongs to this copy of the package, and if not, why.

Looks at files only. `warn` runs once, when the package is imported.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# setup.py writes it where the extension, or its CUDA part, did not build: a line that says what is
# missing and why, then what the tools said.
FAILED = "_build_failed.txt"
SWITCH = "LORA_KERNELS_NO_NATIVE"
BUILD = "pip install -e . --no-build-isolation"


def switched_off() -> bool:
    """Whether the user wants no extension."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def extension(package: Path) -> Path | None:
    """The extension in a folder of the package that this Python can load."""
    files = (package / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


def failure(package: Path = PACKAGE) -> str | None:
    """The line that setup.py wrote about a build that failed."""
    try:
        lines = (package / FAILED).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return lines[0] if lines else None


def elsewhere(package: Path = PACKAGE) -> Path | None:
    """Another copy of the package on sys.path, which has its extension."""
    for entry in sys.path:
        other = Path(entry, package.name).resolve()
        if other != package and extension(other) is not None:
            return other
    return None


def why_missing(package: Path = PACKAGE) -> str:
    """Why the folder has no extension, and what to do."""
    if other := elsewhere(package):
        return (
            f"lora_kernels was imported from {package}, which has no compiled extension, but the "
            f"copy installed in {other} has: run Python from another folder to use that one, or "
            f"build the extension here with `{BUILD}`"
        )
    if reason := failure(package):
        return f"{reason}; mend that and build it with `{BUILD}`"
    others = sorted(file.name for file in package.glob("_C.*"))
    found = (
        f" for {sysconfig.get_config_var('SOABI')} (found {', '.join(others)})" if others else ""
    )
    return f"lora_kernels._C was not built{found}: build it with `{BUILD}` (needs a C++ compiler)"


def warning(package: Path = PACKAGE) -> str | None:
    """A warning for the user: the build failed, or this copy of the package hides the built one.
    None if the user switched the extension off, or in a source tree where nothing was built."""
    if switched_off():
        return None
    if extension(package) is not None:
        return failure(package)  # of the CUDA kernels
    if elsewhere(package) or failure(package):
        return why_missing(package)
    return None


def warn() -> None:
    """Warn. The warning points at the line that imports the package."""
    if text := warning():
        silent = f"; set {SWITCH}=1 to do without it and without this warning"
        details = f" (details: {PACKAGE / FAILED})" if failure() else ""
        quiet = "" if extension(PACKAGE) else silent
        warnings.warn(f"{text}{details}{quiet}", RuntimeWarning, stacklevel=3)
