"""Show this machine, the installed versions and the path every op takes here.

Each op is called once on small inputs; a backend that is not taken says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import torch

from lora_kernels import NF4Weight, functional
from lora_kernels.dispatch import Explanation, explain, native, ops
from lora_kernels.dispatch.cpu import cpuinfo
from lora_kernels.dispatch.registry import BACKEND_VARIABLE
from lora_kernels.dispatch.tuning import VARIABLE as TUNING_VARIABLE
from lora_kernels.ops.common.tuned import VARIABLE as GPU_TUNING_VARIABLE

# Every variable that the package reads: one of them may explain a path.
VARIABLES = (
    BACKEND_VARIABLE,
    TUNING_VARIABLE,
    GPU_TUNING_VARIABLE,
    "LORA_KERNELS_NO_NATIVE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)
PACKAGES = [
    "lora_kernels",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "safetensors",
    "numpy",
]
# Flags of /proc/cpuinfo that decide the speed of a kernel, narrow to wide.
CPU_FLAGS = [
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
]
M, K, N, R = 64, 256, 192, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Print the report; 0."""
    for title, lines in (
        ("machine", machine()),
        ("versions", versions()),
        ("native extension", extension()),
        (f"paths, for x [{M}, {K}] and W [{N}, {K}]", paths()),
    ):
        print(title)
        print("".join(f"  {line}\n" for line in lines))
    return 0


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{name:<{width}}  {value}".rstrip() for name, value in pairs]


def machine() -> list[str]:
    """CPU, its instruction sets, threads, memory, GPUs, and the variables that are set."""
    rows = [
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    ]
    rows.append(("CPU", cpuinfo("model name") or platform.processor() or "unknown"))
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()
    rows.append(("instructions", " ".join(f for f in CPU_FLAGS if f in flags) or "unknown"))
    rows.append(("threads", f"{torch.get_num_threads()} of {_usable_cpus()} usable CPUs"))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        rows.append(("memory", f"{memory:.1f} GiB"))
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        rows.append(
            (
                f"GPU {i}",
                f"{device.name}, sm_{device.major}{device.minor}, "
                f"{device.multi_processor_count} multiprocessors, "
                f"{device.total_memory / 2**30:.1f} GiB",
            )
        )
    if not torch.cuda.device_count():
        built = torch.version.cuda or torch.version.hip
        rows.append(("GPU", "none found" if built else "none (torch is built for the CPU alone)"))
    rows += [(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    return _rows(rows)


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> list[str]:
    """Installed versions of what the package works with."""
    rows = []
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return _rows(rows)


def extension() -> list[str]:
    """Whether the compiled extension is loaded, how it was built, or why it is not there."""
    if not native.available():
        return [f"not loaded: {native.why_unavailable()}"]
    rows = [("state", f"loaded, uses {native.current_isa()}")]
    rows.append(("usable here", ", ".join(native.isas())))
    default = native.default_tuning()
    tuned = [f"{name} {size}" for name, size in native.tuning().items() if size != default[name]]
    rows.append(("block sizes", ", ".join(tuned) or "the defaults"))
    for key, value in native.build_info().items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
        rows.append((f"built: {key}", text or "none"))
    return _rows(rows)


def _train(fn: Callable[..., Any], dtype: torch.dtype, device: str, **kwargs: object) -> None:
    x = torch.ones(M, K, dtype=dtype, device=device, requires_grad=True)
    y = fn(x, **kwargs)
    results = y if isinstance(y, tuple) else (y,)
    torch.autograd.backward(results, [torch.ones_like(t) for t in results])


def _cases(device: str, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Typical calls, by name. Each runs its ops, forward and backward."""
    w = torch.linspace(-1, 1, N * K, device=device).to(dtype).view(N, K)
    a = torch.ones(R, K, device=device, requires_grad=True)
    b = torch.ones(N, R, device=device, requires_grad=True)
    adapter = {"lora_a": a, "lora_b": b, "scale": 2.0, "dropout_p": 0.05}
    quantized = NF4Weight.quantize(w)
    packed = {"lora_a": [a] * 2, "lora_b": [b] * 2, "scales": [2.0] * 2, "dropout_p": 0.05}
    # Down maps from N, the outputs of gate and up, back to K.
    down_a = torch.ones(R, N, device=device, requires_grad=True)
    down_b = torch.ones(K, R, device=device, requires_grad=True)
    mlp = {
        "weights": [w, w, w.T.contiguous()],
        "lora_a": [a, a, down_a],
        "lora_b": [b, b, down_b],
        "scales": [2.0] * 3,
        "dropout_p": 0.05,
    }
    up = torch.ones(M, K, dtype=dtype, device=device)
    dora = {**adapter, "magnitude": torch.ones(N, device=device, requires_grad=True)}
    pages = functional.page_adapters([a, a], [b, b], [2.0, 1.0])
    vocabulary = functional.page_embedding_adapters([a, a], [b, b], [2.0, 1.0])  # K words
    own = torch.arange(M, dtype=torch.int32, device=device) % 3 - 1
    y = torch.zeros(M, N, dtype=dtype, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    labels = torch.zeros(M, dtype=torch.int64, device=device)
    return {
        "quantise": lambda: _discard(NF4Weight.quantize(w)),
        "dequantise": lambda: _discard(quantized.dequantize()),
        "NF4 base": lambda: _train(functional.nf4_linear, dtype, device, qweight=quantized),
        "NF4 base + adapter": lambda: _train(
            functional.nf4_lora_linear, dtype, device, qweight=quantized, **adapter
        ),
        "dense base + adapter": lambda: _train(
            functional.lora_linear, dtype, device, weight=w, **adapter
        ),
        "NF4 projections": lambda: _train(
            functional.lora_packed_linear, dtype, device, weights=[quantized] * 2, **packed
        ),
        "dense projections": lambda: _train(
            functional.lora_packed_linear, dtype, device, weights=[w] * 2, **packed
        ),
        "gated MLP": lambda: _train(functional.lora_mlp, dtype, device, **mlp),
        "gated activation": lambda: _train(functional.gated_activation, dtype, device, up=up),
        "NF4 base + DoRA": lambda: _train(
            functional.dora_linear, dtype, device, weight=quantized, **dora
        ),
        "dense base + DoRA": lambda: _train(
            functional.dora_linear, dtype, device, weight=w, **dora
        ),
        "NF4 base + many adapters": lambda: _train(
            functional.gather_lora, dtype, device, base=quantized, pages=pages, slots=own
        ),
        "dense base + many adapters": lambda: _train(
            functional.gather_lora, dtype, device, base=w, pages=pages, slots=own
        ),
        "many adapters alone": lambda: _discard(functional.gather_lora(up, pages, own, out=y)),
        "embedding + many adapters": lambda: (
            functional.gather_lora_embedding(labels, vocabulary, own, weight=w.T).sum().backward()
        ),
        "embedding's adapters alone": lambda: _discard(
            functional.gather_lora_embedding(labels, vocabulary, own, out=y)
        ),
        "loss": lambda: _train(
            functional.linear_cross_entropy, dtype, device, weight=w, labels=labels
        ),
        "loss of logits": lambda: _discard(
            torch.ops.lora_kernels.cross_entropy(w[:M], labels, -100, True)
        ),
        "dropout mask": lambda: _discard(functional.dropout_mask((M, K), 0.05, seed)),
    }


def _discard(value: object) -> None:
    del value


def paths() -> list[str]:
    """The backend that runs, for each op, case and dtype; below, why others do not."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    columns = [(device, dtype) for device in devices for dtype in dtypes]
    found: dict[tuple[str, str], dict[tuple[str, torch.dtype], str]] = {}
    refused: dict[tuple[str, str, str], list[str]] = {}
    for device, dtype in columns:
        for case, call in _cases(device, dtype).items():
            for told in _explained(call):
                row = found.setdefault((told.op, case), {})
                row.setdefault((device, dtype), told.chosen or "none")
                for backend, reason in told.refusals.items():
                    if reason is not None:
                        where = f"{case}, {device} {_short(dtype)}"
                        places = refused.setdefault((told.op, backend, reason), [])
                        if where not in places:
                            places.append(where)
    head = ["op", "case", *(f"{device} {_short(dtype)}" for device, dtype in columns)]
    table = [head]
    for op in ops():
        rows = [(case, row) for (name, case), row in found.items() if name == op]
        for case, row in rows:
            table.append([op, case, *(row.get(column, "-") for column in columns)])
        if not rows:
            known = ", ".join(i.backend for i in ops()[op].in_order())
            table.append([op, f"no example here; implemented by {known}"])
    lines = _columns(table)
    if refused:
        lines += ["", "not taken, and why"]
    for (op, backend, reason), places in refused.items():
        every = len(places) == sum(len(row) for (name, _), row in found.items() if name == op)
        where = "" if every else f" [{'; '.join(places)}]"
        lines.append(f"{op}, {backend}: {reason}{where}")
    return lines


def _explained(call: Callable[[], None]) -> list[Explanation]:
    try:
        return explain(call)
    except (RuntimeError, ValueError, TypeError) as error:
        # A path that cannot run is a result of this command: show it, and continue.
        print(f"doctor: {error}", file=sys.stderr)
        return []


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _columns(table: list[list[str]]) -> list[str]:
    full = [row for row in table if len(row) == len(table[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(table[0]))]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths)).rstrip() for row in table]  # noqa: B905
