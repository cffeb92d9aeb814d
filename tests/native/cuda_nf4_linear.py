"""Calls of the CUDA NF4 linear kernels: problems, what they should give, and how they run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.code_tables import code_values
from lora_kernels.ops.common.rank import rank_dtype, rank_value
from lora_kernels.ops.lora.reference import shrink
from lora_kernels.ops.nf4 import reference
from tests.native import cuda_launcher
from tests.native.cuda_launcher import (
    COMPUTE,
    DTYPES,
    FLAGS,
    ROOT,
    SHARED_LIMIT,
    DeviceQuantView,
    built,
    execute,
    ptxemu,
    view,
)

# A file for each type of x, then what chooses between them.
TYPES = ("nf4_linear_f32", "nf4_linear_f16", "nf4_linear_bf16")
SOURCES = (*TYPES, "nf4_linear", "lora_shrink")
__all__ = ["COMPUTE", "DTYPES", "Problem", "Run", "oracle", "plain", "ptx", "run", "weight"]


class Nf4Linear(ctypes.Structure):
    """csrc/include/lora_kernels/nf4_linear_cuda.h"""

    _fields_ = (
        ("q", DeviceQuantView),
        ("x", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "ldx")),
        ("bias", ctypes.c_uint64),
        ("a", ctypes.c_uint64),
        ("lda", ctypes.c_int64),
        ("s", ctypes.c_uint64),
        ("lds", ctypes.c_int64),
        ("b", ctypes.c_uint64),
        ("ldb", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("adapters", ctypes.c_int),
        ("y", ctypes.c_uint64),
        ("ldy", ctypes.c_int64),
    )


@dataclass
class Run(cuda_launcher.Run):
    y: Tensor
    s: Tensor | None


@cache
def ptx(compute: int) -> list[str]:
    """Of each type; of a capability that nothing is executed for, too."""
    if compute in COMPUTE:
        return built(*SOURCES).ptx[compute][: len(TYPES)]
    return [
        ptxemu.compile_cuda(
            f'#include "{ROOT / "csrc" / "cuda" / name}.cu"', arch=f"sm_{compute}", flags=FLAGS
        )
        for name in TYPES
    ]


@dataclass
class Problem:
    """One call, of rank `rank` where that is not 0, with `lora` s computed too, of adapters in fp32
    with `wide`; with `wide_s` s is beyond fp16; `pad` is what rows of x, s, B and y have beside
    their elements, `shift` how many elements the first one of each is off alignment; K is split to
    keep all of `cores` at work."""

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
    lora: bool = False
    wide: bool = False
    wide_s: bool = False
    pad: int = 0
    shift: int = 0
    cores: int = 108
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.m * 7919 + self.n * self.k + self.block)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            values = (torch.randn(*shape, generator=generator) * std).to(dtype)
            return values if len(shape) == 1 else self.laid_out(values)

        self.base = random_base(self.meta, generator)
        t = self.tensors
        t["x"] = normal(self.m, self.k)
        if self.bias:
            t["bias"] = normal(self.n)
        if self.rank:
            adapters = torch.float32 if self.wide else self.dtype
            if self.lora:
                std = (2.0**17 if self.wide_s else 1.0) * max(self.k, 1) ** -0.5
                t["a"] = normal(self.rank, self.k, std=std, dtype=adapters)
            else:
                s = rank_value(normal(self.m, self.rank, dtype=torch.float32), self.dtype)
                t["s"] = self.laid_out(s)
            std = 2.0**-8 if self.wide_s else 0.3
            t["b"] = normal(self.n, self.rank, std=std, dtype=adapters)

    def of(self, dtype: torch.dtype) -> Problem:
        return replace(self, dtype=dtype, tensors={})

    @property
    def meta(self) -> Meta:
        return Meta(self.n, self.k, self.block, self.quant_type, self.nested)

    def laid_out(self, values: Tensor) -> Tensor:
        """Rows `pad` elements apart, NaN between them, `shift` elements into their memory."""
        rows, columns = values.shape
        memory = torch.full((self.shift + rows * (columns + self.pad),), torch.nan).to(values.dtype)
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
    # Adapters are rounded to x's type first, by the oracle too.
    t = {n: cast(v if n == "s" else v.to(p.dtype)) for n, v in p.tensors.items()}
    y = t["x"] @ cast(w).T
    if p.rank:
        s = t["s"] if "s" in t else shrink(t["x"], t["a"].T)
        y = (y + p.scale * (s @ t["b"].to(s.dtype).T)).to(y.dtype)
    return y + t["bias"] if p.bias else y


def run(
    p: Problem,
    compute: int = 80,
    seed: int = 0,
    adapters: torch.dtype | None = None,
    shared: int = SHARED_LIMIT,
) -> Run:
    """Executes the launches of one call; `adapters`: what it says the adapters are, `shared`: what
    a block may have."""
    memory = ptxemu.Memory()
    y = p.laid_out(torch.empty(p.m, p.n, dtype=p.dtype))
    ptxemu.poison_(y)
    call = Nf4Linear(q=view(p.base, p.meta, memory), m=p.m, n=p.n, k=p.k, rank=p.rank)
    call.scale = p.scale
    for name, tensor in p.tensors.items():
        setattr(call, name, memory.ptr(tensor, name=name, ro=True))
        if tensor.dim() == 2:
            setattr(call, f"ld{name}", tensor.stride(0))
    s = None
    if p.rank and p.lora:
        s = ptxemu.poison_(torch.empty(p.m, p.rank, dtype=rank_dtype(p.dtype)))
        call.s, call.lds = memory.ptr(s, name="s"), p.rank
    call.adapters = DTYPES[adapters or (torch.float32 if p.wide else p.dtype)]
    call.y, call.ldy = memory.ptr(y, name="y"), y.stride(0)

    library, dtype = built(*SOURCES), DTYPES[p.dtype]
    sizes = [ctypes.c_int64] * 3 + [ctypes.c_int]
    workspace_bytes = library.function("nf4_linear_workspace", sizes, ctypes.c_int64)
    arguments = [ctypes.POINTER(Nf4Linear), ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p]
    linear = library.function("nf4_linear_cuda", arguments)

    def call_it() -> int:
        needed = workspace_bytes(p.m, p.n, p.k, dtype)
        workspace = ptxemu.poison_(torch.empty(needed // 4))
        room = memory.ptr(workspace, name="workspace") if needed else 0
        return linear(ctypes.byref(call), dtype, room, None)

    done = execute(library.launches(compute, p.cores, call_it, shared), memory, seed)
    return Run(done.launches, done.profiles, y, s)
