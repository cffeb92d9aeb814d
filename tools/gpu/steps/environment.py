"""What there is: the device and whether it answers, versions, tools, the extension's build."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from lora_kernels.cli import doctor
from tools.gpu.context import Context, find_tool

TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nvidia-smi", "cmake", "ninja", "c++", "git")
QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,"
    "temperature.gpu,mig.mode.current,persistence_mode"
)
VARIABLES = ("CUDA_", "LORA_KERNELS_", "TRITON_", "PYTORCH_", "CUBLAS_", "OMP_")


def run(context: Context) -> None:
    device = torch.device(context.device)
    for line in (*doctor.machine(), *doctor.versions(), *doctor.extension()):
        print(line)
    facts: dict[str, Any] = {
        "tools": {name: find_tool(name) for name in TOOLS},
        "nvidia-smi": _nvidia_smi(),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        "memory": _memory(),
    }
    if device.type == "cuda" and not torch.cuda.is_available():
        context.answer(
            False,
            f"torch {torch.__version__} sees no CUDA device: nothing below can run",
            stop=True,
            **facts,
        )
    try:
        facts["machine"] = describe(device)
        x = torch.randn(256, 256, device=device)
        right = bool(torch.isfinite(x @ x).all())
    except RuntimeError as error:
        context.answer(False, f"the device does not answer: {error}", stop=True, **facts)
    if not right:
        context.answer(False, "a product of torch's own is not finite", stop=True, **facts)
    gpu = facts["machine"]["gpu"]
    name = gpu["name"] if gpu else "the CPU"
    versions = facts["machine"]["versions"]
    known = ", ".join(f"{k} {versions[k]}" for k in ("torch", "triton") if k in versions)
    context.answer(True, f"{name}, {known}", **facts)


def _nvidia_smi() -> dict[str, str]:
    tool = find_tool("nvidia-smi")
    if tool is None:
        return {}
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={QUERY}", "--format=csv,noheader"],
            text=True,
            stdout=-1,
            stderr=subprocess.STDOUT,
            timeout=15,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    lines = done.stdout.strip().splitlines() or [""]
    values = [v.strip() for v in lines[0].split(",")]
    return dict(zip(QUERY.split(","), values)) if len(values) > 1 else {"error": lines[0]}  # noqa: B905


def _memory() -> str:
    try:
        return Path("/proc/meminfo").read_text().splitlines()[0].split(":")[1].strip()
    except (OSError, IndexError):
        return ""
