"""The 4-bit format: bit-exact with bitsandbytes on the CPU where it is right, and with the format's
definition everywhere. Every backend that takes the ops is held to both.

bitsandbytes is not the judge where K is not a multiple of the block: its AVX512 dequantisation then
gives wrong values, and its short last block divides instead of multiplying by the inverse.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lora_kernels import NF4Weight
from lora_kernels.dispatch import native
from lora_kernels.ops.common.code_tables import code_values
from tests.ops.variants import accepts, all_variants, bits
from tools.op_inputs.source import DTYPES

bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TYPES = ("nf4", "fp4")
VARIANTS = [
    v
    for v in all_variants()
    if accepts("nf4_quantize", v.backend, (torch.zeros(1, device=v.device), 64, 0))
]


# One instruction set of each backend is enough here: `test_parity.py` holds them to each other.
BACKENDS = [v for v in VARIANTS if v.isa in (None, *native.isas()[:1])]


@pytest.fixture(params=VARIANTS, ids=str)
def device(request):
    """Runs the test on one implementation; gives its device."""
    with request.param.active():
        yield request.param.device


@pytest.fixture(params=BACKENDS, ids=str)
def backend_device(request):
    with request.param.active():
        yield request.param.device


def _bnb(w, block_size, nested, quant_type):
    return bnb.quantize_4bit(
        w.cpu(), blocksize=block_size, compress_statistics=nested, quant_type=quant_type
    )


def _assert_same_as_bnb(w, block_size, nested, quant_type):
    ours = NF4Weight.quantize(w, block_size, nested, quant_type)
    packed, state = _bnb(w, block_size, nested, quant_type)
    assert torch.equal(ours.packed.cpu(), packed.flatten())
    assert torch.equal(ours.absmax.cpu(), state.absmax)
    if nested:
        assert torch.equal(bits(ours.nested_absmax.cpu()), bits(state.state2.absmax))
        assert torch.equal(bits(ours.nested_map.cpu()), bits(state.state2.code))
        assert torch.equal(bits(ours.nested_offset.cpu()), bits(state.offset.reshape(1)))
        assert ours.nested_block_size == state.state2.blocksize
    for dtype in DTYPES:
        state.dtype = dtype
        with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile every shape
            expected = bnb.dequantize_4bit(packed, state)
        assert torch.equal(bits(ours.dequantize(dtype).cpu()), bits(expected)), dtype
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bit_exact_with_bitsandbytes(backend_device, block_size, quant_type, nested, dtype):
    w = (torch.randn(2, 4096) * 0.02).to(backend_device, dtype)
    q = _assert_same_as_bnb(w, block_size, nested, quant_type)
    assert q.dtype == dtype and q.dequantize().dtype == dtype


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (5, 192), (300, 256)], ids=str)
def test_bit_exact_with_bitsandbytes_shapes_and_scales(backend_device, shape, scale, quant_type):
    """(300, 256) has 1200 blocks of 64: several nested blocks, the last one short."""
    w = torch.randn(shape, device=backend_device) * scale
    _assert_same_as_bnb(w, 64, True, quant_type)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", TYPES)
def test_bit_exact_with_bitsandbytes_on_ties_and_zeros(backend_device, quant_type, nested):
    """Values on the thresholds and next to them; a block of zeros; equal scales everywhere."""
    values = code_values(TYPES.index(quant_type), torch.device("cpu")).sort().values
    middles = (values[1:] + values[:-1]) / 2
    near = [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))]
    row = torch.cat([*near, values, torch.tensor([1.0, 0.0, -0.0])])
    w = torch.stack([row, -row, row * 0, row, row * 3, row / 7]).to(backend_device)
    assert w.shape == (6, 64)
    _assert_same_as_bnb(w, 64, nested, quant_type)
    _assert_same_as_bnb(w[:2], 64, nested, quant_type)


# --- the definition -------------------------------------------------------------------------------


def _definition(w, block_size, quant_type):
    """Codes, scales and values of the format, one element at a time in fp32."""
    f32 = np.float32
    if quant_type == "nf4":
        table = [f32(v) for v in bnb.get_4bit_type("nf4", device="cpu").tolist()]
    else:
        positive = [0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
        table = [f32(v) for v in positive] + [f32(-v) if v else f32(0) for v in positive]
    order = sorted(range(16), key=lambda code: (table[code], code))
    thresholds = [(table[a] + table[b]) / f32(2) for a, b in itertools.pairwise(order)]
    flat = w.detach().float().flatten().numpy()
    codes, scales, values = [], [], []
    for start in range(0, len(flat), block_size):
        block = flat[start : start + block_size]
        absmax = max(abs(v) for v in block)
        inverse = f32(1) / max(absmax, f32(1e-38))
        scales.append(absmax)
        for v in block:
            scaled = min(max(v * inverse, f32(-1)), f32(1))
            codes.append(order[sum(scaled > t for t in thresholds)])
            values.append(table[codes[-1]] * absmax)
    return codes, scales, torch.tensor(np.array(values)).view(w.shape)


AWKWARD = {
    "K=96": lambda: torch.randn(5, 96),
    "K=100": lambda: torch.randn(7, 100),
    "odd": lambda: torch.randn(7, 31),
    "one": lambda: torch.randn(1, 1),
    "short-last-block": lambda: torch.randn(3, 43),
    "last-block-of-one": lambda: torch.randn(1, 129),
    "zeros": lambda: torch.zeros(3, 50),
    "zero-block": lambda: torch.cat([torch.randn(1, 64), torch.zeros(1, 64), torch.randn(1, 64)]),
    "negative-zeros": lambda: -torch.zeros(2, 33),
    "subnormal": lambda: torch.randn(2, 64) * 1e-40,
    "smallest": lambda: torch.full((2, 40), 1e-45),
    "just-below-the-floor": lambda: torch.full((1, 64), 9.9e-39),
    "huge": lambda: torch.randn(2, 70).clamp(-3, 3) * 1e38,
}


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("name", AWKWARD)
def test_definition(device, name, quant_type, block_size):
    w = AWKWARD[name]()
    codes, scales, values = _definition(w, block_size, quant_type)
    q = NF4Weight.quantize(w.to(device), block_size, False, quant_type)
    zero_code = 7 if quant_type == "nf4" else 0
    codes += [zero_code] * (len(codes) % 2)
    pairs = zip(codes[::2], codes[1::2], strict=True)
    assert q.packed.tolist() == [high << 4 | low for high, low in pairs]
    assert torch.equal(q.absmax.cpu(), torch.tensor(np.array(scales)))
    for dtype in DTYPES:
        assert torch.equal(bits(q.dequantize(dtype).cpu()), bits(values.to(dtype))), dtype


@pytest.mark.parametrize("shape", [(5, 96), (7, 31), (300, 257)], ids=str)
def test_nested_definition(device, shape):
    """value = table[code] * (map[u8] * nested_absmax + offset), every step rounded to fp32."""
    q = NF4Weight.quantize(torch.randn(shape, device=device), 32, True)
    n = shape[0] * shape[1]
    codes8 = q.absmax.cpu().int()
    group = torch.arange(codes8.numel()) // 256
    product = q.nested_map.cpu()[codes8] * q.nested_absmax.cpu()[group]
    scales = (product + q.nested_offset.cpu())[torch.arange(n) // 32]
    packed = q.packed.cpu().int()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:n]
    expected = bnb.get_4bit_type("nf4", device="cpu")[codes] * scales
    for dtype in DTYPES:
        got = q.dequantize(dtype).cpu()
        assert torch.equal(bits(got.flatten()), bits(expected.to(dtype)))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_empty_weight(device, shape, nested):
    q = NF4Weight.quantize(torch.empty(shape, device=device), 64, nested)
    assert q.nbytes == 0 and q.dequantize().shape == shape


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 70, 255])
def test_non_finite_is_rejected(device, where, dtype, bad):
    w = torch.randn(4, 64, device=device).to(dtype)
    w.view(-1)[where] = bad
    with pytest.raises(ValueError, match=rf"^w: .*\b{where}\b") as caught:
        NF4Weight.quantize(w)
    assert "finite" in str(caught.value)


def test_float64_out_of_the_fp32_range_is_rejected():
    with pytest.raises(ValueError, match=r"w: .*finite"):
        NF4Weight.quantize(torch.tensor([[1.0, 1e300]], dtype=torch.float64))


def test_float64_is_rounded_to_fp32_first():
    w = torch.randn(3, 70, dtype=torch.float64)
    q, expected = NF4Weight.quantize(w), NF4Weight.quantize(w.float())
    assert torch.equal(q.packed, expected.packed) and q.dtype == torch.float64
    assert torch.equal(q.dequantize(), expected.dequantize().double())


def test_strided_weight_is_quantised_in_row_major_order(device):
    w = torch.randn(96, 40, device=device)
    q, expected = NF4Weight.quantize(w.T), NF4Weight.quantize(w.T.contiguous())
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(q.absmax, expected.absmax)


def test_bytes_per_weight():
    w = torch.randn(256, 1024)
    assert NF4Weight.quantize(w, 64, False).nbytes / w.numel() == 0.5625
    nested = NF4Weight.quantize(w, 64, True)
    tables = (256 + 1) * 4
    assert nested.nbytes - tables == w.numel() // 2 + 4096 + 4096 // 256 * 4


def test_each_weight_owns_its_scale_map():
    """Loading a checkpoint writes into it."""
    first = NF4Weight.quantize(torch.randn(2, 64))
    first.nested_map.zero_()
    assert NF4Weight.quantize(torch.randn(2, 64)).nested_map.abs().max() == 1
