"""The CUDA codec: the launchers' own launches, executed from their PTX by ptxemu."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.nf4 import reference
from lora_kernels.ops.nf4.double_quant import dynamic_map
from lora_kernels.ops.nf4.schema import NF4Quantize, NF4QuantizeScales
from tests.native.cuda_launcher import (
    COMPUTE,
    DTYPES,
    DeviceQuantView,
    Run,
    built,
    execute,
    ptxemu,
    view,
)

P, I64, INT = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
NONE = -1  # of `bad`, unsigned: nothing was found
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(params=COMPUTE)
def compute(request: pytest.FixtureRequest) -> int:
    return request.param


def random_base(m: Meta) -> list[Tensor]:
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


# --- dequantise -----------------------------------------------------------------------------------


def dequantize(compute: int, base: list[Tensor], m: Meta, dtype: torch.dtype) -> tuple[Tensor, Run]:
    memory = ptxemu.Memory()
    out = ptxemu.poison_(torch.empty(m.n, m.k, dtype=dtype))
    library = built("nf4")
    arguments = [ctypes.POINTER(DeviceQuantView), INT, P, ctypes.c_void_p]
    function = library.function("nf4_dequantize_cuda", arguments)
    q, to = view(base, m, memory), memory.ptr(out, name="out")
    launches = library.launches(
        compute, 108, lambda: function(ctypes.byref(q), DTYPES[dtype], to, None)
    )
    return out, execute(launches, memory)


def check(compute: int, base: list[Tensor], m: Meta, dtype: torch.dtype) -> None:
    out, _ = dequantize(compute, base, m, dtype)
    expected = reference.dequantize(base, m, dtype)
    assert torch.equal(out.view(BITS[dtype]), expected.view(BITS[dtype]))


@pytest.mark.parametrize("nested", [0, 4, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
def test_bit_exact(compute, shape, block_size, quant_type, dtype, nested) -> None:
    m = Meta(*shape, block_size, quant_type, nested)
    check(compute, random_base(m), m, dtype)


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_pointers(compute, dtype, nested) -> None:
    m = Meta(9, 1024, 64, 0, nested)
    base = random_base(m)
    base[0] = torch.cat([base[0][:1], base[0]])[1:]
    check(compute, base, m, dtype)


@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (1024, 4096)),
        (torch.bfloat16, (128, 1024)),
        (torch.float16, (128, 1024)),
        (torch.float32, (128, 1024)),
    ],
    ids=str,
)
def test_traffic(compute, dtype, shape, nested) -> None:
    """Close to the least memory traffic there is: the targets of the kernel's design."""
    m = Meta(*shape, 64, 0, nested)
    base = random_base(m)
    out, run = dequantize(compute, base, m, dtype)
    weights = m.n * m.k
    floor = sum(t.nbytes for t in base) + out.nbytes
    (profile,) = run.profiles
    load, stored = profile.counters["global_load"], profile.counters["global_store"]
    assert run.requested <= 1.05 * floor
    # In sectors of 32 bytes too: next to nothing is fetched in part, nothing written in part.
    assert 32 * stored["sectors"] == out.nbytes == 32 * 16 * stored["requests"]
    assert 32 * (load["sectors"] + stored["sectors"]) <= 1.05 * floor
    assert profile.counters["thread_instructions"] <= 8 * weights


def test_nothing_is_launched_for_nothing() -> None:
    m = Meta(0, 64, 64, 0, 0)
    _, run = dequantize(80, random_base(m), m, torch.bfloat16)
    assert run.launches == []


# --- quantise -------------------------------------------------------------------------------------


def quantize(compute: int, w: Tensor, block_size: int, quant_type: int):
    memory = ptxemu.Memory()
    packed = ptxemu.poison_(torch.empty((w.numel() + 1) // 2, dtype=torch.uint8))
    absmax = ptxemu.poison_(torch.empty(-(-w.numel() // block_size)))
    bad = torch.tensor([NONE])
    library = built("nf4_encode")
    arguments = [P, INT, I64, I64, INT, P, P, P, ctypes.c_void_p]
    function = library.function("nf4_quantize_cuda", arguments)
    to = [memory.ptr(t) for t in (packed, absmax, bad)]
    values = (memory.ptr(w, ro=True), DTYPES[w.dtype], w.numel(), block_size, quant_type)
    launches = library.launches(compute, 108, lambda: function(*values, *to, None))
    run = execute(launches, memory)
    return packed, absmax, int(bad), run


def check_quantized(compute: int, w: Tensor, block_size: int, quant_type: int) -> None:
    packed, absmax, bad, _ = quantize(compute, w, block_size, quant_type)
    expected = reference.nf4_quantize(NF4Quantize(w, block_size, quant_type))
    assert bad == NONE
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values over many magnitudes, a block of zeros, and signed zeros."""
    w = torch.randn(shape).flatten() * torch.rand(shape).flatten().mul(12).exp2()
    w[w.numel() // 2 :][:200] = 0
    w[::97] = -0.0
    return w.view(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", [0, 1])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((1, 1), 64),
        ((3, 7), 32),  # odd
        ((65, 128), 32),
        ((9, 1000), 64),  # two blocks of threads, a ragged end
        ((33, 96), 128),
        ((5, 2048), 256),
        ((6, 1024), 512),
        ((7, 1500), 1024),
        ((5, 2048), 2048),  # of several warps
        ((3, 5000), 4096),
    ],
)
def test_quantize(compute, shape, block_size, quant_type, dtype) -> None:
    check_quantized(compute, weights(shape, dtype), block_size, quant_type)


@pytest.mark.parametrize("quant_type", [0, 1])
def test_quantize_at_the_thresholds(compute, quant_type) -> None:
    """Ties take the lower code, and a step to either side falls on its own."""
    from lora_kernels.ops.common.code_tables import code_bounds

    bounds, _ = code_bounds(quant_type, torch.device("cpu"))
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    steps = torch.cat([bounds, bounds.nextafter(up), bounds.nextafter(down), torch.ones(1)])
    w = torch.cat([torch.nn.functional.pad(steps, (0, 18)), 1e-38 * torch.randn(64)])
    check_quantized(compute, w.view(2, 64), 64, quant_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_unaligned(compute, dtype) -> None:
    w = weights((1, 8193), dtype).flatten()[1:]
    check_quantized(compute, w.view(8, 1024), 64, 0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_finds_what_is_not_finite(compute, dtype, value) -> None:
    w = torch.randn(9, 1000).to(dtype)
    for at in (8999, 4321, 8192):
        w.view(-1)[at] = value
        assert quantize(compute, w, 64, 0)[2] == min(at, 4321 if at != 8999 else at)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_traffic(compute, dtype) -> None:
    w = torch.randn(256, 1024).to(dtype)
    packed, absmax, _, run = quantize(compute, w, 64, 0)
    (profile,) = run.profiles
    floor = w.nbytes + packed.nbytes + absmax.nbytes
    assert run.requested <= 1.01 * floor
    load, stored = profile.counters["global_load"], profile.counters["global_store"]
    assert 32 * load["sectors"] == w.nbytes == 32 * 16 * load["requests"]
    # A store of a load's scales, two or four of them, is part of a sector.
    parts = 4 if dtype == torch.float32 else 2
    assert 32 * stored["sectors"] <= packed.nbytes + parts * absmax.nbytes
    most = 35 if dtype == torch.float32 else 29
    assert profile.counters["thread_instructions"] <= most * w.numel()


# --- quantise the scales --------------------------------------------------------------------------


def quantize_scales(compute: int, absmax: Tensor, code_map: Tensor, offset: Tensor, nested: int):
    memory = ptxemu.Memory()
    codes = ptxemu.poison_(torch.empty(absmax.numel(), dtype=torch.uint8))
    nested_absmax = ptxemu.poison_(torch.empty(-(-absmax.numel() // nested)))
    bad = torch.full((2,), NONE)
    library = built("nf4_encode")
    arguments = [P, I64, I64, P, P, P, P, P, ctypes.c_void_p]
    function = library.function("nf4_quantize_scales_cuda", arguments)
    inputs = [memory.ptr(t, ro=True) for t in (absmax, code_map, offset)]
    values = (inputs[0], absmax.numel(), nested, *inputs[1:])
    to = [memory.ptr(t) for t in (codes, nested_absmax, bad)]
    launches = library.launches(compute, 108, lambda: function(*values, *to, None))
    run = execute(launches, memory)
    return codes, nested_absmax, bad.tolist(), run


@pytest.mark.parametrize(
    ("blocks", "nested"), [(1, 256), (255, 256), (2000, 256), (700, 3), (3000, 1024)]
)
@pytest.mark.parametrize("equal", [False, True])
def test_quantize_scales(compute, blocks, nested, equal) -> None:
    absmax = torch.full((blocks,), 0.7) if equal else torch.randn(blocks).abs()
    offset = absmax.mean().reshape(1) if blocks > 1 else torch.tensor([0.25])
    if equal:
        offset = absmax[:1].clone()
    found = quantize_scales(compute, absmax, dynamic_map(), offset, nested)
    expected = reference.nf4_quantize_scales(
        NF4QuantizeScales(absmax, dynamic_map(), offset, nested)
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] == [NONE, NONE]
    assert len(found[3].launches) == 1


def test_quantize_scales_on_the_grid(compute) -> None:
    """Every tie between entries of the map, and the points of the grid beside it."""
    code_map = dynamic_map()
    middles = (code_map[1:] + code_map[:-1]) / 2
    points = [middles + step / 32767.5 for step in (-1, -0.5, 0, 0.5, 1)]
    absmax = torch.cat([*points, torch.tensor([-1.0, 1.0, 0.0])]) + 2
    found = quantize_scales(compute, absmax, code_map, torch.tensor([2.0]), 2048)
    expected = reference.nf4_quantize_scales(
        NF4QuantizeScales(absmax, code_map, torch.tensor([2.0]), 2048)
    )
    assert torch.equal(found[0], expected[0])


def test_quantize_scales_finds_faults(compute) -> None:
    absmax, code_map = torch.rand(600), dynamic_map().clone()
    absmax[555] = torch.nan
    absmax[400] = torch.inf
    code_map[17] = 2
    offset = torch.tensor([0.5])
    assert quantize_scales(compute, absmax, code_map, offset, 256)[2] == [400, 18]


# --- errors ---------------------------------------------------------------------------------------


def test_sizes_past_a_grid_are_errors() -> None:
    """They are told before anything is launched; nothing is launched for nothing."""
    encode, codec = built("nf4_encode"), built("nf4")
    quantize_it = encode.function("nf4_quantize_cuda", [P, INT, I64, I64, INT, P, P, P, P])
    scales_it = encode.function("nf4_quantize_scales_cuda", [P, I64, I64, P, P, P, P, P, P])
    arguments = [ctypes.POINTER(DeviceQuantView), INT, P, P]
    dequantize_it = codec.function("nf4_dequantize_cuda", arguments)
    huge = DeviceQuantView(n=2**45, block_size=64)
    calls = {
        "quantize": lambda: quantize_it(16, 0, 2**45, 64, 0, 16, 16, 16, 0),
        "dtype": lambda: quantize_it(16, 3, 64, 64, 0, 16, 16, 16, 0),
        "scales": lambda: scales_it(16, 2**32, 1, 16, 16, 16, 16, 16, 0),
        "no nested block": lambda: scales_it(16, 64, 0, 16, 16, 16, 16, 16, 0),
        "dequantize": lambda: dequantize_it(ctypes.byref(huge), 0, 16, 0),
    }
    for name, call in calls.items():
        library = codec if name == "dequantize" else encode
        with pytest.raises(ValueError, match="error 1"):
            library.launches(80, 108, call)
    assert encode.launches(80, 108, lambda: quantize_it(16, 0, 0, 64, 0, 16, 16, 16, 0)) == []
    assert encode.launches(80, 108, lambda: scales_it(16, 0, 256, 16, 16, 16, 16, 16, 0)) == []
