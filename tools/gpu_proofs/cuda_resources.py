"""What the CUDA C++ kernels take of a multiprocessor, in the columns of `resources.rows`."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tools.gpu_proofs.compile import (
    _MAX_BLOCKS,
    _REGISTERS,
    _TENSOR_CORES,
    GpuTarget,
    _nvidia_loads,
    _tool,
)

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
# As csrc/cmake/cuda.cmake.
_FLAGS = ("-O3", "-std=c++17", "--fmad=false", f"-I{ROOT / 'csrc' / 'include'}")
# sm_90a has what only Hopper's own code may use.
_ARCHITECTURES = {"sm_80": "80", "sm_90": "90a", "sm_100": "100"}
_LINEAR_TABLE = 65536  # kSharedBytes of csrc/cuda/nf4_linear.cuh
_NESTED_MAP = 1024  # kMapBytes


def dynamic_shared(kernel: str, tile: str) -> int:
    """Bytes of shared memory that the launcher asks for: the most, where a call decides."""
    if kernel != "linear_kernel":
        return 0
    plain = tile.endswith("false, true")  # not nested, aligned
    return _LINEAR_TABLE + (0 if plain else _NESTED_MAP)


def rows(target: GpuTarget, only: str | None = None) -> list[dict[str, Any]]:
    """A line for each kernel of each source whose label `only` finds; none without nvcc."""
    if target.name not in _ARCHITECTURES or shutil.which("nvcc") is None:
        return []
    found = []
    for source in sorted(SOURCES.glob("*.cu")):
        label = f"csrc/cuda/{source.name}"
        if not only or re.search(only, label):
            found += [{**row, "call": label} for row in _of_source(source, target)]
    return found


def _of_source(source: Path, target: GpuTarget) -> list[dict[str, Any]]:
    arch = _ARCHITECTURES[target.name]
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        _run("nvcc", f"-arch=compute_{arch}", "-ptx", *_FLAGS, str(source), "-o", str(ptx))
        said = _run("ptxas", "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(cubin))
        threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", ptx.read_text()))
        sass = _sections(_run(str(_tool("nvdisasm")), str(cubin)))
    found = []
    for name, block in sorted(_usage(said).items()):
        kernel, arguments = _names(name)
        registers, stack, shared = (_number(block, word) for word in _WORDS)
        shared += dynamic_shared(kernel, arguments)
        warps = -(-int(threads[name]) // 32)
        blocks = _resident(target, registers, shared, warps)
        loads, code = _nvidia_loads(sass[name]), sass[name]
        wide = sum(n for width, n in loads.items() if width in (0, 16))
        tensor = Counter(re.findall(rf"\b({_TENSOR_CORES})", code))
        found.append(
            {
                "target": target.name,
                "kernel": kernel,
                "tile": f"{arguments} w{warps}".lstrip(),
                "flags": "cuda",
                "registers": registers,
                "shared": shared,
                "stack": stack,
                "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
                "blocks": blocks,
                "occupancy": f"{blocks * warps / target.warps_per_core:.3f}",
                "tensor": " ".join(f"{n}:{c}" for n, c in tensor.items()),
                "wide_loads": wide,
                "narrow_loads": sum(loads.values()) - wide,
            }
        )
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout + done.stderr


# How ptxas says registers of a thread, bytes of stack and static shared memory.
_WORDS = (r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes smem")


def _usage(said: str) -> dict[str, str]:
    """What `ptxas -v` says of each kernel."""
    parts = re.split(r"Compiling entry function '(\w+)'", said)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _sections(sass: str) -> dict[str, str]:
    parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*$", sass, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _names(symbol: str) -> tuple[str, str]:
    """A kernel's name and its template arguments, without namespaces."""
    text = _run("c++filt", symbol).strip().replace("(anonymous namespace)::", "")
    text = re.sub(r"\b\w+::", "", text.removeprefix("void "))
    found = re.match(r"(\w+)(?:<(.*)>)?\(", text)
    if found is None:
        raise RuntimeError(f"c++filt: no function in {text!r}")
    return found[1], found[2] or ""


def _resident(target: GpuTarget, registers: int, shared: int, warps: int) -> int:
    """Blocks on a multiprocessor at once."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // per_warp // warps,
        target.shared_per_core // max(1, shared + target.shared_reserved),
        target.warps_per_core // warps,
        _MAX_BLOCKS,
    )
