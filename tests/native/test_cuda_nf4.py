"""The CUDA NF4 dequantise kernel, compiled to PTX and executed on the CPU by ptxemu."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels.ops.nf4 import reference
from lora_kernels.ops.nf4.base import Meta

ROOT = Path(__file__).parents[2]
TOOLS = ROOT.parent / "shared" / "tools"

if shutil.which("nvcc") is None:
    pytest.skip("nvcc is not on PATH", allow_module_level=True)
if not (TOOLS / "ptxemu").is_dir():
    pytest.skip("the PTX emulator ../shared/tools/ptxemu is not there", allow_module_level=True)
sys.path.insert(0, str(TOOLS))
ptxemu = pytest.importorskip("ptxemu", reason="the PTX emulator does not build here")

KERNEL_TYPES = {torch.float32: "PairF32", torch.float16: "PairF16", torch.bfloat16: "PairBF16"}
WARP_TILE, WARPS = 2048, 8  # csrc/cuda/nf4.cu


class DeviceQuantView(ctypes.Structure):
    """csrc/include/lora_kernels/nf4_cuda.h"""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                "packed",
                "absmax",
                "absmax8",
                "nested_absmax",
                "nested_map",
                "nested_offset",
            )
        ),
        ("n", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("nested_block", ctypes.c_int64),
        ("quant_type", ctypes.c_int),
    )


@pytest.fixture(scope="session", params=["sm_80", "sm_90"])
def ptx(request: pytest.FixtureRequest) -> str:
    source = (ROOT / "csrc" / "cuda" / "nf4.cu").read_text()
    flags = ("-O3", "-std=c++17", f"-I{ROOT / 'csrc' / 'include'}")
    return ptxemu.compile_cuda(source, arch=request.param, flags=flags)


def kernel_name(ptx: str, dtype: torch.dtype, nested: bool) -> str:
    pattern = rf"\.entry (\S*dequantize_kernelI\S*{KERNEL_TYPES[dtype]}ELb{int(nested)}E\w*)\("
    (name,) = re.findall(pattern, ptx)
    return name


def random_base(m: Meta) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(m.n * m.k + m.block_size)
    packed = torch.randint(0, 256, ((m.n * m.k + 1) // 2,), dtype=torch.uint8, generator=generator)
    if not m.is_nested:
        return [packed, torch.rand(m.blocks, generator=generator) * 3]
    nested_blocks = -(-m.blocks // m.nested_block_size)
    return [
        packed,
        torch.randint(0, 256, (m.blocks,), dtype=torch.uint8, generator=generator),
        torch.rand(nested_blocks, generator=generator),
        torch.randn(256, generator=generator),
        torch.rand(1, generator=generator),
    ]


def run(ptx: str, base: list[torch.Tensor], m: Meta, dtype: torch.dtype, aligned: bool = True):
    memory = ptxemu.Memory()
    n = m.n * m.k
    out = ptxemu.poison_(torch.empty(n, dtype=dtype))
    names = ["packed", "absmax8", "nested_absmax", "nested_map", "nested_offset"]
    view = DeviceQuantView(n=n, block_size=m.block_size, nested_block=m.nested_block_size)
    view.quant_type = m.quant_type
    for name, tensor in zip(names if m.is_nested else ["packed", "absmax"], base, strict=True):
        setattr(view, name, memory.ptr(tensor, name=name, ro=True))
    grid = -(-n // (WARP_TILE * WARPS))
    shift = m.block_size.bit_length() - 1
    result = ptxemu.launch(
        ptx,
        kernel_name(ptx, dtype, m.is_nested),
        grid,
        32 * WARPS,
        [bytes(view), out, shift, int(aligned)],
        mem=memory,
    )
    return out.view(m.n, m.k), result


@pytest.mark.parametrize("nested", [0, 4, 256])
@pytest.mark.parametrize("dtype", KERNEL_TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "block_size", "quant_type"),
    [
        ((1, 1), 64, 0),
        ((3, 7), 64, 0),  # shorter than a warp tile, odd
        ((8, 256), 32, 0),  # one warp tile, two sets of scales
        ((33, 96), 64, 0),  # rows that are no multiple of the block
        ((5, 4099), 128, 1),  # odd, several blocks of threads, a ragged end
        ((4, 4096), 4096, 0),  # a scale for two warp tiles
        ((17, 1024), 512, 1),
    ],
)
def test_bit_exact(ptx, shape, block_size, quant_type, dtype, nested) -> None:
    m = Meta(*shape, block_size, quant_type, nested)
    base = random_base(m)
    check(run(ptx, base, m, dtype)[0], base, m, dtype)


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", KERNEL_TYPES, ids=str)
def test_unaligned_pointers(ptx, dtype, nested) -> None:
    m = Meta(9, 1024, 64, 0, nested)
    base = random_base(m)
    base[0] = torch.cat([base[0][:1], base[0]])[1:]
    check(run(ptx, base, m, dtype, aligned=False)[0], base, m, dtype)


def check(out: torch.Tensor, base: list[torch.Tensor], m: Meta, dtype: torch.dtype) -> None:
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    expected = reference.dequantize(base, m, dtype)
    assert torch.equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", KERNEL_TYPES, ids=str)
def test_traffic(ptx, dtype, nested) -> None:
    """Close to the least memory traffic there is: the targets of the kernel's design."""
    m = Meta(128, 1024, 64, 0, nested)
    base = random_base(m)
    out, result = run(ptx, base, m, dtype)
    weights = m.n * m.k
    floor = sum(t.nbytes for t in base) + out.nbytes
    counters = result.counters
    load, stored = counters["global_load"], counters["global_store"]
    assert load["bytes"] + stored["bytes"] <= 1.05 * floor
    # In sectors of 32 bytes too: next to nothing is fetched in part, nothing written in part.
    assert 32 * stored["sectors"] == out.nbytes
    assert 32 * (load["sectors"] + stored["sectors"]) <= 1.05 * floor
    assert counters["thread_instructions"] <= 8 * weights
