"""Launchers of csrc/cuda, their launches executed by ptxemu on the CPU.

A source is compiled whole, host part too, and linked against cuda_stub.c, which hands every launch
back: what runs is the grid and the arguments that a GPU would be given.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from tools import ptxemu as ptxemu
from tools.gpu_proofs import emulator

ROOT = Path(__file__).parents[2]

if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on PATH", allow_module_level=True)
if emulator.missing() is not None:
    pytest.skip(emulator.missing() or "", allow_module_level=True)

FLAGS = (
    "-O3",
    "-std=c++17",
    "--fmad=false",  # as csrc/cmake/cuda.cmake
    f"-I{ROOT / 'csrc' / 'include'}",
    f"-I{ROOT / 'csrc' / 'cuda'}",
)
COMPUTE = (80, 90)
SHARED_LIMIT = 99 * 1024  # of a block on sm_86 and sm_89, the smallest
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

POINTERS = ("packed", "absmax", "absmax8", "nested_absmax", "nested_map", "nested_offset")


class DeviceQuantView(ctypes.Structure):
    """csrc/include/lora_kernels/nf4_cuda.h"""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("n", "block_size", "nested_block")),
        ("quant_type", ctypes.c_int),
    )


def view(base: Sequence[Tensor], m: Meta, memory: Any) -> DeviceQuantView:
    """A base weight as the launchers take it, its tensors read-only."""
    q = DeviceQuantView(n=m.n * m.k, block_size=m.block_size, nested_block=m.nested_block_size)
    q.quant_type = m.quant_type
    names = ["packed", "absmax8", "nested_absmax", "nested_map", "nested_offset"]
    for name, tensor in zip(names if m.is_nested else ["packed", "absmax"], base, strict=True):
        setattr(q, name, memory.ptr(tensor, name=name, ro=True))
    return q


class LaunchConfig(ctypes.Structure):
    """cuda_stub.c"""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(LaunchConfig), ctypes.POINTER(ctypes.c_void_p)
)


@dataclass
class Launch:
    kernel: str
    ptx: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    args: list[bytes]
    follows: bool  # may start before the launch in front of it has ended


@dataclass
class Run:
    """Launches and what they did, one profile each."""

    launches: list[Launch]
    profiles: list[Any]

    def total(self, *names: str, of: str) -> int:
        return sum(p.counters[name][of] for p in self.profiles for name in names)

    @property
    def requested(self) -> int:
        return sum(p.global_bytes_requested for p in self.profiles)

    @property
    def sector_bytes(self) -> int:
        return sum(p.global_load_sector_bytes + p.global_store_sector_bytes for p in self.profiles)


class Built:
    """The launchers of some sources with the PTX of their kernels, by compute capability."""

    def __init__(self, sources: Sequence[Path], folder: Path) -> None:
        targets = [f"-gencode=arch=compute_{c},code=compute_{c}" for c in COMPUTE]
        stub = Path(__file__).with_name("cuda_stub.c")
        library = folder / "launcher.so"
        command = ["nvcc", "-shared", "-Xcompiler=-fPIC,-w", "-cudart=none", "-keep", "--threads=2"]
        command += [f"-keep-dir={folder}", *targets, *FLAGS, *map(str, sources), str(stub)]
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        self.ptx = {
            c: [(folder / f"{s.stem}.compute_{c}.ptx").read_text() for s in sources]
            for c in COMPUTE
        }
        self.library = ctypes.CDLL(str(library))
        self.symbols = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout.split()

    def function(self, name: str, arguments: Sequence[Any], result: Any = ctypes.c_int) -> Any:
        """A function of namespace lora_kernels."""
        (symbol,) = (
            s for s in self.symbols if re.match(rf"_ZN12lora_kernels{len(name)}{name}E", s)
        )
        function = getattr(self.library, symbol)
        function.argtypes, function.restype = arguments, result
        return function

    def launches(
        self, compute: int, cores: int, call: Callable[[], int], shared: int = SHARED_LIMIT
    ) -> list[Launch]:
        """What a call launches, in order, on a GPU of that capability with `cores` multiprocessors
        and `shared` bytes of shared memory a block.

        Raises:
            ValueError: the call returns an error.
        """
        found: list[Launch] = []

        def on_launch(kernel: bytes, config: Any, args: Any) -> None:
            name, c = kernel.decode(), config.contents
            (ptx,) = (p for p in self.ptx[compute] if f".entry {name}(" in p)
            sizes = [p["size"] for p in ptxemu.load(ptx).info(name)["params"]]
            values = [ctypes.string_at(args[i], size) for i, size in enumerate(sizes)]
            follows = c.attribute_count > 0
            grid = tuple(c.grid)
            found.append(Launch(name, ptx, grid, c.block[0], c.shared, values, follows))

        callback = ON_LAUNCH(on_launch)
        self.library.stub_setup(callback, compute // 10, shared, cores)
        error = call()
        if error != 0:
            raise ValueError(f"error {error}")
        return found


@cache
def built(*names: str) -> Built:
    """Sources of csrc/cuda, by stem."""
    sources = [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        return Built(sources, Path(folder))


def execute(launches: Sequence[Launch], memory: Any, seed: int = 0) -> Run:
    """Runs launches, every check of the emulator on."""
    profiles = [
        ptxemu.launch(
            one.ptx,
            one.kernel,
            one.grid,
            one.threads,
            one.args,
            one.shared,
            mem=memory,
            threads=2,
            seed=seed,
            slice=50 if seed else 100000,
        )
        for one in launches
    ]
    faults = [f"{r['kind']}: {r['msg']}" for profile in profiles for r in profile.reports]
    assert not faults, faults[0]
    return Run(list(launches), profiles)
