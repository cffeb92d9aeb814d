"""The compiled extension: found where it was brought along, else built here for this GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.gpu.context import ROOT, Context

ARCHS = "LORA_KERNELS_CUDA_ARCHS"


def run(context: Context) -> None:
    """Never stops the run: without it the other backends are measured."""
    why = _why_missing()
    if why is None:
        context.answer(True, "the extension is there: nothing to build")
    command, env = _command(context)
    print(f"{why}\nto build: {' '.join(command)} with {env}")
    if context.dry:
        context.answer(True, f"not built in a dry run: {why}")
    missing = [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]
    if missing:
        context.answer(False, f"not built, {', '.join(missing)} not found: {why}")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env})
    why = _why_missing()
    if done.returncode or why:
        context.answer(False, f"not built, status {done.returncode}: {why}")
    context.answer(True, "built")


def _why_missing() -> str | None:
    """Asked in another process, which finds what has just been built and may die of it."""
    code = (
        "from lora_kernels.dispatch import native; import sys; "
        "print(native.why_unavailable() or native.build_info()); sys.exit(not native.available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT
    )
    print(done.stdout.strip())
    lines = done.stdout.strip().splitlines() or [f"its process ended with {done.returncode}"]
    return lines[-1] if done.returncode else None


def _command(context: Context) -> tuple[list[str], dict[str, str]]:
    """The build of the one architecture that is here, with every core."""
    settings = os.environ.get("LORA_KERNELS_CMAKE_ARGS", "")
    if ARCHS not in settings and (arch := _architecture()):
        settings = f"{settings} -D{ARCHS}={arch}".strip()
    env = {
        "LORA_KERNELS_CMAKE_ARGS": settings,
        "LORA_KERNELS_REQUIRE_NATIVE": "1",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
    }
    nvcc = Path("/usr/local/cuda/bin")
    if shutil.which("nvcc") is None and (nvcc / "nvcc").exists():
        env["PATH"] = f"{os.environ.get('PATH', '')}:{nvcc}"
    return [sys.executable, "setup.py", "build_ext", "--inplace"], env


def _architecture() -> str | None:
    """As CMake names it: 90a-real for a Hopper; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
        text=True,
        stdout=-1,
        timeout=20,
    )
    found = re.match(r"(\d+)\.(\d)", done.stdout.strip())
    if not found:
        return None
    number = found[1] + found[2]
    return f"{number}a-real" if number == "90" else f"{number}-real"
