"""CUDA C++ to PTX, and what ptxas says of PTX."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_FIGURES = {
    "registers": r"Used (\d+) registers",
    "static_shared": r"(\d+) bytes smem",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
}


@cache
def compile_cuda(
    source: str,
    arch: str = "sm_80",
    flags: tuple[str, ...] = ("-O3", "-std=c++17"),
    nvcc: str = "nvcc",
) -> str:
    """The PTX of CUDA C++ source text."""
    with tempfile.TemporaryDirectory() as folder:
        text, ptx = Path(folder, "a.cu"), Path(folder, "a.ptx")
        text.write_text(source)
        virtual = f"-arch={arch.replace('sm_', 'compute_')}"
        command = [nvcc, virtual, "-ptx", *flags, str(text), "-o", str(ptx)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return ptx.read_text()


def _assemblers() -> Iterator[Path]:
    """Triton's two ptxas and the toolkit's: Triton's PTX for sm_90 is of a version that only its
    ptxas-blackwell takes."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        yield from (tools / "ptxas", tools / "ptxas-blackwell")
    if found := shutil.which("ptxas"):
        yield Path(found)
    if found := shutil.which("nvcc"):
        yield Path(found).resolve().parent / "ptxas"


def ptxas_info(
    ptx: str, arch: str = "sm_80", ptxas: str | None = None
) -> dict[str, dict[str, int]]:
    """Registers, spills, stack and static shared memory of each kernel, as ptxas says."""
    known = [Path(ptxas)] if ptxas else [p for p in _assemblers() if p.exists()]
    said = "ptxas: not found"
    for path in known:
        with tempfile.TemporaryDirectory() as folder:
            text, cubin = Path(folder, "a.ptx"), Path(folder, "a.cubin")
            text.write_text(ptx)
            command = [str(path), "-v", f"-arch={arch}", str(text), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True)
        said = done.stderr
        if done.returncode == 0:
            return _read(said)
        if "Unsupported .version" not in said:
            break
    raise RuntimeError(said)


def _read(said: str) -> dict[str, dict[str, int]]:
    parts = re.split(r"Compiling entry function '(\S+)'", said)
    return {
        kernel: {
            name: int(found[-1])
            for name, pattern in _FIGURES.items()
            if (found := re.findall(pattern, text))
        }
        for kernel, text in zip(parts[1::2], parts[2::2], strict=True)
    }
