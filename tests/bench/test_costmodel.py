"""The cost model on examples worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cases import BOTH, FWD, Case
from bench.costmodel import (
    Cost,
    cost,
    model_cost,
    quantised_bytes,
    saved_bytes,
    weight_bytes,
)
from bench.data import CaseData
from bench.memory import saved_for_backward
from bench.providers import PROVIDERS
from bench.suites import STEP
from lora_kernels import NF4Weight
from lora_kernels.dispatch import native


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


def test_packed_projections_share_x() -> None:
    """M=9, K=128, N = 96, 64 and 64 (the latter two with a bias), r=8, bf16."""
    case = Case("lora_packed", "tiny.qkv", 9, BOTH, 8)
    m, k, n, r = 9, 128, 96 + 64 + 64, 8
    adapters = r * (3 * k + n)
    forward = cost(replace(case, direction=FWD))
    assert forward.flops == 2 * m * n * k + 2 * m * adapters
    assert forward.bytes_read == 2 * (m * k + n * k + 128 + adapters)
    assert forward.bytes_written == 2 * m * n
    both = cost(case)
    assert both.flops == 2 * forward.flops + 2 * m * adapters
    read_backward = 2 * (m * n + n * k + adapters + m * k + 3 * m * r)
    assert both.bytes_read == forward.bytes_read + read_backward
    assert both.bytes_written == 2 * (m * n + 3 * m * r) + 2 * (m * k + adapters)


def test_mlp_writes_gate_and_up_for_the_backward_only() -> None:
    """M=9, 96 wide, 160 inside, r=4, bf16."""
    case = Case("lora_mlp", "tiny.mlp", 9, BOTH, 4)
    m, k, inner, r = 9, 96, 160, 4
    adapters = 3 * r * (k + inner)
    forward = cost(replace(case, direction=FWD))
    assert forward.flops == 2 * m * 3 * k * inner + 2 * m * adapters + 2 * m * inner
    assert forward.bytes_read == 2 * (m * k + 3 * k * inner + adapters)
    assert forward.bytes_written == 2 * m * k
    both = cost(case)
    made = m * (3 * r + 2 * inner)
    assert both.bytes_written == forward.bytes_written + 2 * made + 2 * (m * k + adapters)
    read_backward = 2 * (m * k + 3 * k * inner + adapters + m * k + made)
    assert both.bytes_read == forward.bytes_read + read_backward


def test_glu_is_two_in_one_out_and_three_in_two_out() -> None:
    """7 x 96 elements."""
    assert cost(Case("glu", "tiny", 7)) == Cost(2 * 672, 4 * 672, 2 * 672)
    assert cost(Case("glu", "tiny", 7, BOTH)) == Cost(9 * 672, 10 * 672, 6 * 672)


def test_dora_reads_norms_and_keeps_what_the_magnitude_scaled() -> None:
    """M=9, K=128, N=96, r=4, x in bf16, adapter in fp32."""
    m, n, k, r = 9, 96, 128, 4
    adapter = 4 * (r * (k + n) + n)
    case = Case("dora_linear", "tiny", m, BOTH, r, adapter_dtype="fp32")
    forward = cost(replace(case, direction=FWD))
    assert forward.flops == 2 * m * n * k + 2 * m * r * (k + n) + 2 * n * k * r
    assert forward.bytes_read == 2 * (m * k + n * k) + adapter + 4 * n
    assert forward.bytes_written == 2 * m * n
    both = cost(case)
    assert both.bytes_written == 2 * (2 * m * n + m * r) + 4 * n + 2 * m * k + adapter
    dropped = cost(replace(case, dropout=0.1))
    assert dropped.bytes_written == both.bytes_written
    assert dropped.bytes_read == both.bytes_read
    assert dropped.flops == both.flops + 2 * (2 * m * n * k)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "case",
    [
        Case("lora_packed", "tiny.qkv", 40, BOTH, 8),
        Case("lora_packed", "tiny.qkv", 40, BOTH, 8, 0.25, adapter_dtype="fp32"),
        Case("lora_mlp", "tiny.mlp", 40, BOTH, 8),
        Case("lora_mlp", "tiny.mlp", 40, BOTH, 8, 0.25, adapter_dtype="fp32"),
        Case("glu", "tiny", 40, BOTH),
        Case("dora_linear", "tiny", 40, BOTH, 8),
        Case("dora_linear", "tiny-bias", 40, BOTH, 8),
        Case("dora_linear", "tiny", 40, BOTH, 8, 0.25, adapter_dtype="fp32"),
        Case("gather_lora_embed", "tiny", 40, BOTH, 8, adapters=3, loaded=5, mixed=True),
    ],
    ids=lambda case: case.name,
)
def test_ours_keep_what_the_model_says(case: Case, backend: str) -> None:
    if backend == "native" and not native.available():
        pytest.skip(f"needs the extension: {native.why_unavailable()}")
    provider = next(p for p in PROVIDERS if p.name == f"ours:{backend}")
    prepared = provider.build(CaseData(case, torch.device("cpu"), 1))
    forward = prepared.forward
    assert forward is not None
    with prepared.context():
        kept = saved_for_backward(lambda: forward(0), prepared.parameters)
    assert kept == saved_bytes(case)


def test_embedding_reads_the_rows_of_its_tokens() -> None:
    """9 ids, rows of 96, r=8, 3 adapters in use, bf16."""
    case = Case("gather_lora_embed", "tiny", 9, r=8, adapters=3, loaded=5)
    read = 8 * 9 + 2 * 9 * 96 + 2 * (9 * 8 + 3 * 8 * 96)
    assert cost(case) == Cost(2 * 9 * 8 * 96, read, 2 * 9 * 96)
    # u and dB; the gradients of three adapters, A of 128 tokens.
    backward = Cost(4 * 9 * 8 * 96, read, 2 * 3 * 8 * (128 + 96))
    assert cost(replace(case, direction=BOTH)) == cost(case) + backward


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


def test_whole_models_have_a_formula_of_their_own() -> None:
    with pytest.raises(ValueError, match="no cost model"):
        cost(STEP)


def test_packed_4_bit_weights_are_read_each_in_its_own_blocks() -> None:
    one, kv = (quantised_bytes(n, 128, 64, True) for n in (96, 64))
    assert weight_bytes(Case("nf4_lora_packed", "tiny.qkv", 1, r=4)) == one + 2 * kv


def test_floors_of_a_whole_model() -> None:
    """A tiny Llama: 2 blocks, hidden 64, keys and values of 32, a gated MLP of 128, 256 tokens."""
    base = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    ranks = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    head = 256 * 64
    case = Case("generate", "tiny-llama", 5, r=4, adapter_dtype="fp32")
    plain = model_cost(case, quantised=False, adapted=False)
    assert plain.bytes == 5 * 2 * (2 * base + head)
    tokens = 32 + 5 - 1
    attention = 2 * 4 * 64 * tokens * (tokens + 1) // 2
    assert plain.flops == 2 * 2 * tokens * base + attention + 2 * 5 * head
    adapted = model_cost(case, quantised=False, adapted=True)
    assert adapted.bytes - plain.bytes == 5 * 2 * 4 * ranks
    assert adapted.flops - plain.flops == 2 * 2 * tokens * ranks
    assert model_cost(case, quantised=True, adapted=False).bytes < plain.bytes
    prefill = replace(case, op="prefill", m=9)
    assert model_cost(prefill, False, False).bytes_read == 2 * (2 * base + head)
    step = Case("step", "tiny-llama", 32, BOTH, 4, 0.05, adapter_dtype="fp32")
    both = model_cost(step, quantised=False, adapted=True)
    assert both.bytes_written == 2 * 4 * ranks
    attention = 3 * 2 * 32 * 9 * 64
    assert both.flops == 2 * (2 * 32 * (2 * base + 3 * ranks) + attention) + 4 * 32 * head
