"""The cost model on examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cases import BOTH, STEP, Case
from bench.costmodel import Cost, cost, quantised_bytes, saved_bytes, weight_bytes
from lora_kernels import NF4Weight


def test_square_4096_decode() -> None:
    """M=1 on 4096x4096, nested: 8 388 608 code bytes + 262 144 scales + 1 024 fp32 + 1 028."""
    c = cost(Case("nf4_linear", "square-4096", 1))
    assert c.flops == 2 * 4096 * 4096
    assert c.bytes_read == 8_388_608 + 262_144 + 4 * 1024 + 1028 + 2 * 4096
    assert c.bytes_written == 2 * 4096


def test_plain_absmax_is_four_bytes_a_block() -> None:
    assert quantised_bytes(4096, 4096, 64, nested=False) == 8_388_608 + 4 * 262_144
    assert quantised_bytes(3, 5, 64, nested=False) == 8 + 4


@pytest.mark.parametrize("nested", [True, False])
def test_stored_size_is_what_the_weight_takes(nested: bool) -> None:
    weight = NF4Weight.quantize(torch.randn(96, 128), double_quant=nested)
    case = Case("nf4_linear", "tiny", 1, nested=nested)
    assert weight.nbytes == weight_bytes(case)


def test_lora_forward_and_backward() -> None:
    """M=7, K=128, N=96, r=4, x in bf16, adapters in fp32."""
    c = cost(Case("lora_linear", "tiny", 7, BOTH, 4, adapter_dtype="fp32"))
    m, k, n, r = 7, 128, 96, 4
    forward = 2 * m * n * k + 2 * m * r * (k + n)
    backward = 2 * m * n * k + 4 * m * r * (k + n)
    assert c.flops == forward + backward == 2 * 172_032 + 12_544 + 25_088
    adapters = 4 * r * (k + n)
    read_forward = 2 * m * k + 2 * n * k + adapters
    read_backward = 2 * m * n + 2 * n * k + adapters + 2 * m * k + 2 * m * r
    assert c.bytes_read == read_forward + read_backward
    assert c.bytes_written == (2 * m * n + 2 * m * r) + (2 * m * k + adapters)


def test_inference_keeps_no_s() -> None:
    forward = cost(Case("nf4_lora_linear", "tiny", 2, r=8))
    assert forward.bytes_written == 2 * 2 * 96


def test_saved_are_x_and_s_and_a_seed() -> None:
    """M=7, K=128, r=4, bf16, whatever the adapters are: 7 (128 + 4) elements; the seed is int64."""
    case = Case("lora_linear", "tiny", 7, BOTH, 4, adapter_dtype="fp32")
    assert saved_bytes(case) == 2 * 7 * 132
    assert saved_bytes(replace(case, dropout=0.1)) == 2 * 7 * 132 + 8
    assert saved_bytes(replace(case, op="nf4_lora_linear", dtype="fp32")) == 4 * 7 * 132


def test_bias_is_read_once() -> None:
    with_bias = cost(Case("lora_linear", "tiny-bias", 3, r=8))
    # 3x64 x, 64x64 w, 64 bias and 8x(64+64) adapters, 2 bytes each
    assert with_bias.bytes_read == 2 * (3 * 64 + 64 * 64 + 64 + 8 * 128)


def test_codecs() -> None:
    stored = 96 * 128 // 2 + 192 + 4 + 1028
    assert cost(Case("nf4_dequantize", "tiny", 0)) == Cost(96 * 128, stored, 2 * 96 * 128)
    quantise = cost(Case("nf4_quantize", "tiny", 0, dtype="fp32"))
    assert (quantise.bytes_read, quantise.bytes_written) == (4 * 96 * 128, stored)


def test_floor_is_the_slower_of_arithmetic_and_traffic() -> None:
    limits = {"flops_per_s": 1e3, "read_per_s": 10.0, "copy_per_s": 20.0}
    assert Cost(5000, 10, 0).seconds(**limits) == 5.0  # arithmetic
    assert Cost(0, 100, 0).seconds(**limits) == 10.0  # reads alone
    assert Cost(0, 100, 40).seconds(**limits) == 80 / 20 + 60 / 10  # 40 pairs, 60 reads


def test_step_has_no_formula() -> None:
    with pytest.raises(ValueError, match="no cost model"):
        cost(STEP)
