"""The CPU kernels of NF4/FP4 on every instruction set: bit-exact with the format's definition."""

from __future__ import annotations

import functools

import pytest
import torch

from lora_kernels.ops.common.base import BLOCK_SIZES
from lora_kernels.ops.common.code_tables import code_bounds
from lora_kernels.ops.nf4 import reference
from lora_kernels.ops.nf4.double_quant import dynamic_map
from lora_kernels.ops.nf4.schema import NF4Quantize, NF4QuantizeScales

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
native_ops = torch.ops.lora_kernels_native
# Around one vector of 32 elements, one block, a whole chunk of a thread, and odd.
SIZES = (0, 1, 31, 33, 4095, 4096, 4097, 12365, 40001)


def weight(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Random, with blocks of zeros, of subnormals and of repeated ends."""
    w = torch.randn(n) * 0.02
    w[64:192] = 0
    w[256:320] *= 1e-38
    w[512:576] = w[512:576].sign() * 0.5
    return w.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def nested_base(n: int, block_size: int, nested_block: int) -> list[torch.Tensor]:
    blocks = -(-n // block_size)
    return [
        torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.rand(-(-blocks // nested_block)),
        torch.randn(256),
        torch.rand(1),
    ]


# Cached: every tier is compared with the same expectation.
@functools.cache
def quantize_case(n: int, block_size: int, dtype: torch.dtype, quant_type: int):
    w = weight(n, dtype)
    return w, *reference.nf4_quantize(NF4Quantize(w, block_size, quant_type))


@functools.cache
def dequantize_case(
    n: int, block_size: int, dtype: torch.dtype, quant_type: int, nested_block: int
):
    base = nested_base(n, block_size, nested_block or 1)
    if nested_block == 0:
        base = [base[0], torch.randn(base[1].numel())]
    meta = [1, n, block_size, quant_type, nested_block]
    return base, meta, reference.dequantize(base, meta, dtype)


@functools.cache
def every_code_and_scale(dtype: torch.dtype, quant_type: int):
    """Scales of every sign and exponent: products that round, tie, overflow, vanish."""
    high = torch.arange(-(1 << 15), 1 << 15, 5) << 16
    # Exact in bfloat16; halfway between two bfloat16 or two fp16 numbers when the code is 1.
    bits = torch.cat([high, high | 0x8000, high | 0x1000])
    absmax = bits.to(torch.int32).view(torch.float32)
    absmax = absmax[absmax.isfinite()]
    codes = torch.arange(16, dtype=torch.uint8)
    base = [(codes << 4 | codes.flip(0)).repeat(absmax.numel()), absmax]
    meta = [absmax.numel(), 32, 32, quant_type, 0]
    return base, meta, reference.dequantize(base, meta, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_quantize(isa: str, block_size: int, dtype: torch.dtype) -> None:
    for quant_type in (0, 1):
        for n in SIZES:
            w, *expected = quantize_case(n, block_size, dtype, quant_type)
            packed, absmax = native_ops.nf4_quantize(w, block_size, quant_type)
            assert torch.equal(packed, expected[0])
            assert torch.equal(absmax, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantize(isa: str, block_size: int, dtype: torch.dtype) -> None:
    for quant_type in (0, 1):
        for n in SIZES:
            for nested_block in (0, 3, 256):
                base, meta, expected = dequantize_case(
                    n, block_size, dtype, quant_type, nested_block
                )
                assert same_bits(native_ops.nf4_dequantize(base, meta, dtype), expected)


@pytest.mark.parametrize("quant_type", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_every_code_and_scale(isa: str, dtype: torch.dtype, quant_type: int) -> None:
    base, meta, expected = every_code_and_scale(dtype, quant_type)
    assert same_bits(native_ops.nf4_dequantize(base, meta, dtype), expected)


@functools.cache
def every_exponent(dtype: torch.dtype, quant_type: int):
    """Blocks of every magnitude, with elements at and next to the thresholds."""
    bounds = code_bounds(quant_type, torch.device("cpu"))[0]
    near = [bounds, bounds.nextafter(torch.tensor(9.0)), bounds.nextafter(torch.tensor(-9.0))]
    block = torch.cat([*near, torch.tensor([1.0, 0.0, -0.0]), torch.rand(80) * 2 - 1])
    powers = torch.arange(-140, 127, dtype=torch.float64).exp2()
    scales = torch.cat([powers, powers * 1.37, -powers * 1.996])
    w = (block.double() * scales[:, None]).to(dtype)
    w = w[w.isfinite().all(dim=1)]
    return w, *reference.nf4_quantize(NF4Quantize(w, 128, quant_type))


@pytest.mark.parametrize("quant_type", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_every_exponent(isa: str, dtype: torch.dtype, quant_type: int) -> None:
    w, *expected = every_exponent(dtype, quant_type)
    packed, absmax = native_ops.nf4_quantize(w, 128, quant_type)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])


@functools.cache
def large_case():
    n = (8 << 20) + 77
    base = nested_base(n, 64, 256)
    meta = [1, n, 64, 0, 256]
    return base, meta, reference.dequantize(base, meta, torch.bfloat16)


def test_dequantize_large(isa: str) -> None:
    """From 16 MiB on the stores depend on whether the memory was in use before."""
    base, meta, expected = large_case()
    for _ in range(4):
        assert same_bits(native_ops.nf4_dequantize(base, meta, torch.bfloat16), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_bitsandbytes(isa: str, block_size: int, dtype: torch.dtype, quant_type: str) -> None:
    pytest.importorskip("bitsandbytes")
    kind = ("nf4", "fp4").index(quant_type)
    w = weight(24 * 4096, dtype).view(24, 4096)
    peer, peer_absmax = torch.ops.bitsandbytes.quantize_4bit(w, block_size, quant_type, torch.uint8)
    packed, absmax = native_ops.nf4_quantize(w, block_size, kind)
    assert torch.equal(packed, peer.flatten())
    assert torch.equal(absmax, peer_absmax)
    peer_w = torch.ops.bitsandbytes.dequantize_4bit(
        peer, peer_absmax, block_size, quant_type, w.shape, dtype
    )
    out = native_ops.nf4_dequantize([packed, absmax], [24, 4096, block_size, kind, 0], dtype)
    assert same_bits(out, peer_w)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(isa: str, threads: int) -> None:
    n = 1_000_003
    w = weight(n, torch.bfloat16)
    expected = reference.nf4_quantize(NF4Quantize(w, 64, 0))
    torch.set_num_threads(threads)
    packed, absmax = native_ops.nf4_quantize(w, 64, 0)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    meta = [1, n, 64, 0, 0]
    out = native_ops.nf4_dequantize([packed, absmax], meta, torch.bfloat16)
    assert same_bits(out, reference.dequantize([packed, absmax], meta, torch.bfloat16))

    scales = [absmax, dynamic_map(), absmax.mean().reshape(1), 256]
    codes, nested_absmax = native_ops.nf4_quantize_scales(*scales)
    expected = reference.nf4_quantize_scales(NF4QuantizeScales(*scales))
    assert torch.equal(codes, expected[0])
    assert same_bits(nested_absmax, expected[1])
    base, meta = [packed, codes, nested_absmax, *scales[1:3]], [1, n, 64, 0, 256]
    out = native_ops.nf4_dequantize(base, meta, torch.bfloat16)
    assert same_bits(out, reference.dequantize(base, meta, torch.bfloat16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_non_finite_element_is_named(isa: str, dtype: torch.dtype, value: float) -> None:
    torch.set_num_threads(2)
    w = weight(300_001, dtype)
    for index in (300_000, 170_000, 37, 0):
        w[index] = value
        with pytest.raises(ValueError, match=rf"^w: element {index} \(flat index\) is {value}"):
            native_ops.nf4_quantize(w, 64, 0)


def test_bad_arguments_touch_no_memory() -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "lora_kernels_native::nf4_dequantize", "CPU"
    ):
        pytest.skip("needs the extension")
    packed, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    nested = nested_base(128, 64, 256)

    def dequantize(base, meta, dtype=torch.float32):
        return native_ops.nf4_dequantize(base, meta, dtype)

    cases = {
        r"packed: got shape \[63\], expected \[64\]": lambda: dequantize(
            [packed[:63], absmax], [2, 64, 64, 0, 0]
        ),
        r"packed: is not contiguous": lambda: dequantize(
            [torch.zeros(128, dtype=torch.uint8)[::2], absmax], [2, 64, 64, 0, 0]
        ),
        r"packed: got dtype float32, expected uint8": lambda: dequantize(
            [absmax, absmax], [2, 64, 64, 0, 0]
        ),
        r"absmax: got shape \[2\], expected \[4\]": lambda: dequantize(
            [packed, absmax], [2, 64, 32, 0, 0]
        ),
        r"absmax: got dtype uint8, expected float32": lambda: dequantize(
            [packed, packed[:2]], [2, 64, 64, 0, 0]
        ),
        r"block_size: got 48": lambda: dequantize([packed, absmax], [2, 64, 48, 0, 0]),
        r"block_size: got 8192": lambda: dequantize([packed, absmax], [2, 64, 8192, 0, 0]),
        r"quant_type: got 2": lambda: dequantize([packed, absmax], [2, 64, 64, 2, 0]),
        r"nested_block_size: got -1": lambda: dequantize([packed, absmax], [2, 64, 64, 0, -1]),
        r"base: got 2 tensors, expected 5": lambda: dequantize(
            [packed, absmax], [2, 64, 64, 0, 256]
        ),
        r"nested_map: got shape \[255\]": lambda: dequantize(
            [*nested[:3], nested[3][:255], nested[4]], [2, 64, 64, 0, 256]
        ),
        r"meta: got 3 numbers": lambda: dequantize([packed, absmax], [2, 64, 64]),
        r"meta: got N = -1": lambda: dequantize([packed, absmax], [-1, 64, 64, 0, 0]),
        r"expected N K <= 2\^60": lambda: dequantize([packed, absmax], [2**40, 2**40, 64, 0, 0]),
        r"base: is dense": lambda: dequantize([packed, absmax], [2, 64]),
        r"dtype: got dtype float64": lambda: dequantize(
            [packed, absmax], [2, 64, 64, 0, 0], torch.float64
        ),
        r"w: got dtype float64": lambda: native_ops.nf4_quantize(torch.ones(4).double(), 64, 0),
        r"w: is not contiguous": lambda: native_ops.nf4_quantize(torch.ones(4, 4).t()[1:], 64, 0),
        r"nested_map: got shape \[255\], expected \[256\]": lambda: native_ops.nf4_quantize_scales(
            absmax, nested[3][:255], nested[4], 256
        ),
        r"nested_map: got .* before .*, expected rising": lambda: native_ops.nf4_quantize_scales(
            absmax, -dynamic_map(), nested[4], 256
        ),
        r"nested_offset: got shape \[2\]": lambda: native_ops.nf4_quantize_scales(
            absmax, dynamic_map(), absmax, 256
        ),
        r"nested_block_size: got 0": lambda: native_ops.nf4_quantize_scales(
            absmax, dynamic_map(), nested[4], 0
        ),
        r"absmax: element 1 is inf": lambda: native_ops.nf4_quantize_scales(
            torch.tensor([1.0, float("inf")]), dynamic_map(), nested[4], 256
        ),
        r"block_size: got 0": lambda: native_ops.nf4_quantize(torch.ones(4), 0, 0),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
