"""The launcher of the CUDA NF4 linear kernels, its launches executed by ptxemu on the CPU.

`csrc/cuda/nf4_linear.cu` is compiled whole, host part too, and linked against cuda_stub.c, which
hands every launch back: what runs is the grid and the arguments that a GPU would be given.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.nf4 import reference
from lora_kernels.ops.nf4.base import Meta
from lora_kernels.ops.nf4.tables import code_values

ROOT = Path(__file__).parents[2]
TOOLS = ROOT.parent / "shared" / "tools"

if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on PATH", allow_module_level=True)
if not (TOOLS / "ptxemu").is_dir():
    pytest.skip("the PTX emulator ../shared/tools/ptxemu is not there", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
ptxemu = pytest.importorskip("ptxemu", reason="the PTX emulator does not build here")

SOURCE = ROOT / "csrc" / "cuda" / "nf4_linear.cu"
FLAGS = (
    "-O3",
    "-std=c++17",
    "--fmad=false",  # as csrc/cmake/cuda.cmake
    f"-I{ROOT / 'csrc' / 'include'}",
)
COMPUTE = (80, 90)
SHARED_LIMIT = 99 * 1024  # of a block on sm_86 and sm_89, the smallest
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NAMESPACE = "_ZN12lora_kernels"


POINTERS = ("packed", "absmax", "absmax8", "nested_absmax", "nested_map", "nested_offset")


class DeviceQuantView(ctypes.Structure):
    """csrc/include/lora_kernels/nf4_cuda.h"""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("n", "block_size", "nested_block")),
        ("quant_type", ctypes.c_int),
    )


class Nf4Linear(ctypes.Structure):
    """csrc/include/lora_kernels/nf4_linear_cuda.h"""

    _fields_ = (
        ("q", DeviceQuantView),
        ("x", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "ldx")),
        ("bias", ctypes.c_uint64),
        ("s", ctypes.c_uint64),
        ("lds", ctypes.c_int64),
        ("b", ctypes.c_uint64),
        ("ldb", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_uint64),
        ("ldy", ctypes.c_int64),
    )


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
    grid: tuple[int, ...]
    threads: int
    shared: int
    args: list[bytes]
    follows: bool  # may start before the launch in front of it has ended


@dataclass
class Run:
    y: Tensor
    profiles: list[Any]
    launches: list[Launch]

    def total(self, *names: str, of: str) -> int:
        return sum(p.counters[name][of] for p in self.profiles for name in names)

    @property
    def requested(self) -> int:
        return sum(p.global_bytes_requested for p in self.profiles)

    @property
    def sector_bytes(self) -> int:
        return sum(p.global_load_sector_bytes + p.global_store_sector_bytes for p in self.profiles)


class Built:
    """The launcher with the PTX of its kernels, by compute capability."""

    def __init__(self, folder: Path) -> None:
        targets = [f"-gencode=arch=compute_{c},code=compute_{c}" for c in COMPUTE]
        stub = Path(__file__).with_name("cuda_stub.c")
        library = folder / "launcher.so"
        command = ["nvcc", "-shared", "-Xcompiler=-fPIC,-w", "-cudart=none", "-keep"]
        command += [f"-keep-dir={folder}", *targets, *FLAGS, str(SOURCE), str(stub)]
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        self.ptx = {c: (folder / f"{SOURCE.stem}.compute_{c}.ptx").read_text() for c in COMPUTE}
        self.library = ctypes.CDLL(str(library))
        self.linear = getattr(
            self.library,
            f"{NAMESPACE}15nf4_linear_cudaERKNS_9Nf4LinearENS_5DtypeEPfP11CUstream_st",
        )
        self.linear.argtypes = [
            ctypes.POINTER(Nf4Linear),
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_void_p,
        ]
        self.workspace = getattr(self.library, f"{NAMESPACE}20nf4_linear_workspaceElllNS_5DtypeE")
        self.workspace.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int]
        self.workspace.restype = ctypes.c_int64

    def device(self, compute: int, cores: int) -> None:
        """What the launcher is told of its GPU from now on."""
        module = ptxemu.load(self.ptx[compute])

        def on_launch(kernel: bytes, config: Any, args: Any) -> None:
            name, c = kernel.decode(), config.contents
            sizes = [p["size"] for p in module.info(name)["params"]]
            values = [ctypes.string_at(args[i], size) for i, size in enumerate(sizes)]
            self.found.append(
                Launch(name, tuple(c.grid), c.block[0], c.shared, values, c.attribute_count > 0)
            )

        self.callback = ON_LAUNCH(on_launch)
        self.library.stub_setup(self.callback, compute // 10, SHARED_LIMIT, cores)

    def launches(self, call: Nf4Linear, dtype: int, workspace: int) -> list[Launch]:
        """What one call launches, in order."""
        self.found: list[Launch] = []
        error = self.linear(ctypes.byref(call), dtype, workspace, None)
        if error != 0:
            raise ValueError(f"nf4_linear_cuda: error {error}")
        return self.found


@cache
def built() -> Built:
    with tempfile.TemporaryDirectory() as folder:
        return Built(Path(folder))


@cache
def ptx(compute: int) -> str:
    """Of a capability that nothing is executed for, too."""
    if compute in COMPUTE:
        return built().ptx[compute]
    return ptxemu.compile_cuda(f'#include "{SOURCE}"', arch=f"sm_{compute}", flags=FLAGS)


@dataclass
class Problem:
    """One call; `pad` is what rows of x, s, B and y have beside their elements, `shift` how many
    elements the first one of each is off alignment; K is split to keep all of `cores` at work."""

    m: int
    n: int
    k: int
    block: int = 64
    nested: int = 0
    quant_type: int = 0
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    rank: int = 0
    scale: float = 0.75
    pad: int = 0
    shift: int = 0
    cores: int = 108
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.m * 7919 + self.n * self.k + self.block)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            values = (torch.randn(*shape, generator=generator) * std).to(self.dtype)
            return values if len(shape) == 1 else self.laid_out(values)

        self.base = random_base(self.meta, generator)
        t = self.tensors
        t["x"] = normal(self.m, self.k)
        if self.bias:
            t["bias"] = normal(self.n)
        if self.rank:
            t["s"] = normal(self.m, self.rank)
            t["b"] = normal(self.n, self.rank, std=0.3)

    def of(self, dtype: torch.dtype) -> Problem:
        return replace(self, dtype=dtype, tensors={})

    @property
    def meta(self) -> Meta:
        return Meta(self.n, self.k, self.block, self.quant_type, self.nested)

    def laid_out(self, values: Tensor) -> Tensor:
        """Rows `pad` elements apart, NaN between them, `shift` elements into their memory."""
        rows, columns = values.shape
        memory = torch.full((self.shift + rows * (columns + self.pad),), torch.nan).to(self.dtype)
        view = memory[self.shift :].view(rows, columns + self.pad)[:, :columns]
        view.copy_(values)
        return view


def random_base(m: Meta, generator: torch.Generator) -> list[Tensor]:
    packed = torch.randint(0, 256, ((m.n * m.k + 1) // 2,), dtype=torch.uint8, generator=generator)
    if not m.is_nested:
        return [packed, torch.rand(m.blocks, generator=generator) * 0.1]
    nested_blocks = -(-m.blocks // m.nested_block_size)
    return [
        packed,
        torch.randint(0, 256, (m.blocks,), dtype=torch.uint8, generator=generator),
        torch.rand(nested_blocks, generator=generator) * 0.1,
        torch.linspace(-1, 1, 256),
        torch.rand(1, generator=generator) * 0.1,
    ]


def oracle(p: Problem, rounded: bool = True) -> Tensor:
    """y in fp64, of weights rounded to x's type or as they are stored."""
    return _linear(p, weight(p, p.dtype if rounded else torch.float64), torch.Tensor.double)


def plain(p: Problem) -> Tensor:
    return _linear(p, weight(p, p.dtype), torch.Tensor.contiguous)


def weight(p: Problem, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float64:
        return reference.dequantize(p.base, p.meta, dtype)
    codes = torch.stack((p.base[0] >> 4, p.base[0] & 15), dim=1).flatten()[: p.n * p.k]
    scales = reference.block_scales(p.base, p.meta).repeat_interleave(p.block)[: p.n * p.k]
    values = code_values(p.quant_type, codes.device)[codes.int()]
    return (values.double() * scales.double()).view(p.n, p.k)


def _linear(p: Problem, w: Tensor, cast: Any) -> Tensor:
    t = {name: cast(tensor) for name, tensor in p.tensors.items()}
    y = t["x"] @ cast(w).T
    if p.rank:
        y = y + p.scale * (t["s"] @ t["b"].T)
    return y + t["bias"] if p.bias else y


def run(p: Problem, compute: int = 80, seed: int = 0) -> Run:
    """Executes the launches of one call, every check of the emulator on."""
    memory = ptxemu.Memory()
    y = p.laid_out(torch.empty(p.m, p.n, dtype=p.dtype))
    ptxemu.poison_(y)
    dtype = DTYPES[p.dtype]
    built().device(compute, p.cores)
    bytes_needed = built().workspace(p.m, p.n, p.k, dtype)
    workspace = ptxemu.poison_(torch.empty(bytes_needed // 4))
    view = DeviceQuantView(n=p.n * p.k, block_size=p.block, nested_block=p.nested)
    view.quant_type = p.quant_type
    names = ["packed", "absmax8", "nested_absmax", "nested_map", "nested_offset"]
    for name, tensor in zip(names if p.nested else ["packed", "absmax"], p.base, strict=True):
        setattr(view, name, memory.ptr(tensor, name=name, ro=True))
    call = Nf4Linear(q=view, m=p.m, n=p.n, k=p.k, rank=p.rank, scale=p.scale)
    for name, tensor in p.tensors.items():
        setattr(call, name, memory.ptr(tensor, name=name, ro=True))
        if tensor.dim() == 2:
            setattr(call, f"ld{name}", tensor.stride(0))
    call.y, call.ldy = memory.ptr(y, name="y"), y.stride(0)
    room = memory.ptr(workspace, name="workspace") if bytes_needed else 0
    launches = built().launches(call, dtype, room)
    profiles = [
        ptxemu.launch(
            built().ptx[compute],
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
    return Run(y, profiles, launches)
