"""A LoRA layer over a 4-bit weight for few tokens: the CUDA launches, executed by ptxemu."""

from __future__ import annotations

import re

import pytest
import torch

from lora_kernels.ops.lora.reference import shrink
from lora_kernels.testing import assert_within_budget
from tests.native import cuda_nf4_linear as cuda
from tests.native.cuda_nf4_linear import DTYPES
from tests.native.cuda_nf4_linear import Problem as P

SHAPES = {
    "one token": P(1, 64, 512, rank=16),
    "ragged, wide": P(3, 70, 256, nested=256, bias=True, rank=5, wide=True),
    "split": P(5, 65, 4096, bias=True, rank=16),
    "K odd": P(7, 33, 33, quant_type=1, bias=True, rank=3, shift=1),
    "unaligned, wide": P(2, 40, 1024, rank=8, shift=1, pad=3, wide=True),
    "no K": P(3, 5, 0, rank=4),
    "large rank": P(9, 64, 320, rank=136, pad=8),
    "large rank, wide": P(17, 66, 192, bias=True, rank=100, wide=True),
    "32 tokens": P(29, 65, 384, nested=256, rank=24, pad=8),
    "64 tokens": P(64, 70, 320, bias=True, rank=16, wide=True),
    "50 tokens, ragged": P(50, 35, 133, nested=256, rank=9),
}


def of(shape: str, dtype: torch.dtype) -> P:
    p = SHAPES[shape]
    p.lora = True
    return p.of(dtype)


def check(p: P, r: cuda.Run) -> None:
    x, a = p.tensors["x"], p.tensors["a"].to(p.dtype)
    assert_within_budget(r.s, x.double() @ a.double().T, shrink(x, a.T))
    assert_within_budget(r.y, cuda.oracle(p), cuda.plain(p))


@pytest.mark.grid
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("compute", cuda.COMPUTE)
def test_s_beyond_fp16(compute: int, tokens: int, wide: bool) -> None:
    p = P(tokens, 70, 320, bias=True, rank=20, wide=wide, wide_s=True, lora=True)
    r = cuda.run(p.of(torch.float16), compute)
    assert r.s is not None and r.s.abs().max() > torch.finfo(torch.float16).max
    check(p.of(torch.float16), r)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compute", cuda.COMPUTE)
def test_within_budget(compute: int, shape: str, dtype: torch.dtype) -> None:
    p = of(shape, dtype)
    check(p, cuda.run(p, compute))


def test_launches() -> None:
    """On sm_90 each launch may start before the one in front of it has ended; the reader of s, and
    the sum of the parts, wait for it inside."""
    p = of("split", torch.bfloat16)
    for compute in cuda.COMPUTE:
        r = cuda.run(p, compute)
        kernels = [re.search(r"shrink|linear_kernel|sum", one.kernel)[0] for one in r.launches]
        assert kernels == ["shrink", "linear_kernel", "sum"]
        assert [one.follows for one in r.launches] == [False, compute >= 90, compute >= 90]
        waits = [p.counters["griddepcontrol"]["wait"] > 0 for p in r.profiles]
        assert waits == [False, compute >= 90, compute >= 90]
    no_rows = P(2, 0, 64, rank=4, lora=True)
    assert len(cuda.run(no_rows).launches) == 1  # s alone
    assert cuda.run(P(0, 64, 64, rank=4, lora=True)).launches == []


def test_no_read_of_s_before_the_wait() -> None:
    """In the code's order; the emulator runs one launch after the other."""
    kernels = [k for ptx in cuda.ptx(90) for k in re.split(r"\.entry ", ptx)[1:]]
    linear = [k for k in kernels if "linear_kernel" in k.split("(")[0]]
    assert len(linear) > 20
    for kernel in linear:
        assert kernel.count("griddepcontrol.wait") == 1
        before, after = kernel.split("griddepcontrol.wait")
        assert "mma" in before or "fma" in before  # the main loop
        assert "ld.global" in after


@pytest.mark.parametrize("compute", cuda.COMPUTE)
@pytest.mark.parametrize("shape", ["split", "64 tokens"])
def test_same_bits_in_any_order_of_warps(shape: str, compute: int) -> None:
    p = of(shape, torch.bfloat16)
    first = cuda.run(p, compute)
    other = cuda.run(p, compute, seed=1)
    assert torch.equal(other.s, first.s) and torch.equal(other.y, first.y)


def test_refuses() -> None:
    p = P(65, 8, 64, rank=4, lora=True)
    with pytest.raises(ValueError, match="error 1"):
        cuda.run(p)
    p = of("one token", torch.float32)
    with pytest.raises(ValueError, match="error 1"):  # adapters that are neither x's type nor fp32
        cuda.run(p, adapters=torch.bfloat16)
    with pytest.raises(ValueError, match="error 1"):  # a GPU with too little shared memory
        cuda.run(p, shared=48 * 1024)


@pytest.mark.parametrize(("m", "requested"), [(1, 1.5), (8, 2.6)])
def test_traffic(m: int, requested: float) -> None:
    p = P(m, 1024, 4096, rank=16, lora=True)
    r = cuda.run(p)
    floor = sum(t.nbytes for t in [*p.base, *p.tensors.values(), r.s, r.y])
    assert r.requested <= requested * floor
    (shrink, *_), tensors = r.profiles, p.tensors
    # A once for 8 tokens, x once for four ranks.
    assert shrink.global_bytes_requested == (
        tensors["a"].nbytes + tensors["x"].nbytes * p.rank // 4 + r.s.nbytes
    )
    check(p, r)
