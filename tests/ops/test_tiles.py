"""The Triton primitives alone: products, roundings and the dropout mask."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.testing import assert_within_budget
from tests.ops.variants import DEVICES, bits, interpreting

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from lora_kernels.ops.common.philox import threshold  # noqa: E402
from lora_kernels.ops.common.triton import tiles  # noqa: E402  (needs triton)

RUNS_ON = [
    pytest.param(d, marks=[pytest.mark.gpu] if d == "cuda" else [])
    for d in DEVICES
    if interpreting() or d == "cuda"
] or [pytest.param("none", marks=pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or CUDA"))]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _dot_kernel(p_left, p_right, p_out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    o_m, o_k, o_n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    b_left = tl.load(p_left + o_m[:, None] * K + o_k[None, :])
    b_right = tl.load(p_right + o_k[:, None] * N + o_n[None, :])
    b_sum = tl.full([M, N], 1.0, tl.float32)
    b_sum = tiles.dot(b_left, b_right, b_sum, "ieee")
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], b_sum)


@triton.jit
def _cast_kernel(p_in, p_out, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_out + o_n, tiles.cast(tl.load(p_in + o_n), p_out.dtype.element_ty))


@triton.jit
def _rest_kernel(p_in, p_out, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(p_out + o_n, tiles.rounding_residual(tl.load(p_in + o_n), p_out.dtype.element_ty))


@triton.jit
def _keep_kernel(
    p_seed, p_out, m0, k0, stream, threshold, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o_m = m0 + tl.arange(0, ROWS)
    b_keep = tiles.keep_tile(p_seed, o_m, k0, stream, threshold, ROWS, COLS)
    o_out = tl.arange(0, ROWS)[:, None] * cols + tl.arange(0, COLS)[None, :]
    tl.store(p_out + o_out, b_keep.to(tl.uint8))


@pytest.mark.parametrize("device", RUNS_ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dot_is_a_product_summed_in_fp32(dtype, device):
    left = torch.randn(16, 64).to(dtype).to(device)
    right = torch.randn(64, 32).to(dtype).to(device)
    out = torch.empty(16, 32, device=device)
    _dot_kernel[(1,)](left, right, out, 16, 64, 32)
    plain = left.float() @ right.float() + 1
    assert_within_budget(out, left.double() @ right.double() + 1, plain)


def _awkward() -> torch.Tensor:
    """fp32 values where a cast to 16 bits has to decide: halves, the ends, zeros. No subnormals of
    bf16: Triton's interpreter converts them wrongly by itself."""
    ends = torch.tensor([0.0, -0.0, 1.2e-38, -1.2e-38, 6e-8, -6e-8, 65504.0, 65519.9, 3.3895e38])
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3F801000, 0x3F803000])
    some = torch.randn(1024 - len(ends) - len(ties), generator=torch.Generator().manual_seed(2))
    return torch.cat([ends, ties.to(torch.int32).view(torch.float32), some])


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("device", RUNS_ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_rounds_to_nearest_even_as_torch_does(dtype, device):
    values = _awkward().to(device)
    out = torch.empty(len(values), dtype=dtype, device=device)
    _cast_kernel[(1,)](values, out, len(values))
    assert torch.equal(bits(out), bits(values.to(dtype)))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("device", RUNS_ON)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rest_is_what_rounding_takes_but_of_an_overflow(dtype, device):
    values = _awkward()
    values[-2:] = torch.tensor([torch.inf, -torch.inf])
    rounded = values.to(dtype).float()
    rest = torch.where(rounded.isfinite(), values - rounded, 0.0).to(dtype)
    out = torch.empty(len(values), dtype=dtype, device=device)
    _rest_kernel[(1,)](values.to(device), out, len(values))
    assert torch.equal(bits(out.cpu()), bits(rest))
    assert rest.count_nonzero() > 900


@pytest.mark.parametrize("device", RUNS_ON)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize(("m0", "k0", "stream"), [(0, 0, 0), (1000, 8, 3), (7, 4096, 2**31 - 1)])
def test_keep_tile_is_the_mask_of_its_place(m0, k0, stream, seed, device):
    p, rows, cols = 0.3, 16, 64
    seeds = torch.tensor([seed], device=device)
    out = torch.empty(rows, cols, dtype=torch.bool, device=device)
    args = (m0, k0, stream, threshold(p), cols)
    _keep_kernel[(1,)](seeds, out.view(torch.uint8), *args, rows, cols)
    with use_backend("reference"):
        mask = torch.ops.lora_kernels.dropout_mask(seeds, m0 + rows, k0 + cols, p, stream)
    assert torch.equal(out, mask[m0:, k0:])
