"""Where a measurement was made: hardware, thread count, versions, commit; and what it can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_kernels.dispatch.cpu import cpu_model, cpuinfo
from tools.records import commit

_ISA_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_fp16", "asimd", "fphp", "bf16", "i8mm", "sve"),
)
_PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "torchao", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as it goes into every result file."""
    return {
        "cpu": cpu_model(),
        "isa": isa_flags(),
        "native": native_build(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu(device),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def summary(machine: dict[str, Any]) -> str:
    """One line for a table's title or a plot."""
    if machine["gpu"]:
        return f"{machine['gpu']['name']}, torch {machine['versions']['torch']}"
    threads = machine["threads"]
    return (
        f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}, "
        f"torch {machine['versions']['torch']}"
    )


def isa_flags() -> list[str]:
    present = (cpuinfo("flags") or cpuinfo("Features")).split()
    return [f for f in _ISA_FLAGS if f in present]


def native_build() -> dict[str, Any]:
    """Whether the compiled extension is there, how it was built and which ISA it runs on."""
    from lora_kernels.dispatch import native

    if not native.available():
        return {"available": False, "why": native.why_unavailable()}
    return {"available": True, "isa": native.current_isa(), **native.build_info()}


def gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    p = torch.cuda.get_device_properties(device)
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory": p.total_memory,
        "l2": p.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("lora_kernels", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Limits:
    """What this machine reaches on plain torch kernels, the best of several tries.

    Attributes:
        read: bytes per second of a sum over a buffer that no cache holds.
        copy: bytes per second of a copy of such a buffer, read and written bytes both counted.
        gemm: FLOP per second of the best dense GEMM, by dtype name.
    """

    read: float
    copy: float
    gemm: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements: another process can only have lowered one."""
        gemm = {name: max(v, other.gemm[name]) for name, v in self.gemm.items()}
        return Limits(max(self.read, other.read), max(self.copy, other.copy), gemm)

    def __str__(self) -> str:
        gemm = ", ".join(f"{k} GEMM {v / 1e12:.2f} TFLOP/s" for k, v in self.gemm.items())
        return f"read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s, {gemm}"


def measure_limits(
    device: torch.device, dtypes: list[str], *, buffer_bytes: int = 1 << 30, gemm_size: int = 4096
) -> Limits:
    """Measure bandwidth and GEMM speed with the current number of threads; a few seconds.

    Args:
        dtypes: names of the dtypes whose GEMM is wanted.
        buffer_bytes: size of each bandwidth buffer; larger than any last-level cache.
        gemm_size: edge of the largest GEMM tried.
    """
    from bench.cases import DTYPES

    read, copy = _bandwidth(device, buffer_bytes)
    return Limits(read, copy, {n: _gemm(device, DTYPES[n], gemm_size) for n in dtypes})


def _bandwidth(device: torch.device, buffer_bytes: int) -> tuple[float, float]:
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.empty_like(source)
    rows = source.view(1 << 10, -1)
    vector = torch.ones(rows.shape[1], device=device)
    reading = min(_best(lambda: source.sum(), device), _best(lambda: rows @ vector, device))
    copying = _best(lambda: target.copy_(source), device)
    return source.nbytes / reading, 2 * source.nbytes / copying


def _gemm(device: torch.device, dtype: torch.dtype, largest: int) -> float:
    """FLOP/s of the best square a·bᵀ of edge `largest` and its halves down to 1024."""
    best = 0.0
    for size in (largest, largest // 2, largest // 4):
        if size < min(1024, largest):
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = max(best, 2 * size**3 / _best(lambda a=a, b=b: a @ b.T, device))  # type: ignore[misc]
    return best


def _best(call: Callable[[], object], device: torch.device, budget: float = 0.6) -> float:
    """Seconds of the fastest call, over at least 3 and about `budget` seconds of them."""
    from bench.timing import Stopwatch

    stopwatch = Stopwatch.on(device)
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 200):
        times.append(stopwatch.time(call))
    return min(times)
