"""The linear layers on every instruction set, over shapes that divide nothing.

Errors are held to the package's budget; the oracle has its 4-bit base decoded to x's dtype first.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from tests.native import lora_cases
from tests.native.lora_cases import DTYPES, REFERENCE, Base, Branch, Case, check
from tests.ops.variants import bits

native_ops = torch.ops.lora_kernels_native

# Either side of the crossovers between kernels, of a tile of rows, of a block of rows.
ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 130)

# Blocks that straddle rows, rows that begin in the middle of a byte, one block for many rows, more
# than one chunk of K and N.
BASES = (
    Base(65, 67),
    Base(131, 320),
    Base(66, 128, block=64, nested=256),
    Base(37, 129, block=64),
    Base(300, 576, block=64, nested=256),
    Base(9, 96, block=32, nested=4, quant_type=1),
    Base(21, 192, block=4096),
    Base(33, 4160, block=4096, nested=4, quant_type=1),
    Base(1, 77, block=64, nested=256, quant_type=1),
    Base(130, 1, block=64),
)
BRANCHES = (
    Branch(16, adapters=torch.float32),
    Branch(1, 0.5, out_diag=True, bias=True),
    Branch(17, 0.1, rank_diag=True, bias=True, adapters=torch.float32),
    Branch(64, 0.05, rank_diag=True, out_diag=True),
)
ALL = Branch(8, 0.1, rank_diag=True, out_diag=True, bias=True, adapters=torch.float32)


# Kept for a while: every tier is compared with the same expectation.
expected = functools.lru_cache(maxsize=100)(lora_cases.expected)


def cases(op: str, dtype: torch.dtype):
    bases = [b for b in BASES if b.block or op.startswith("lora")]
    for i, (m, base) in enumerate(itertools.product(ROWS, bases)):
        yield Case(op, m, base, BRANCHES[(i + i // len(bases)) % len(BRANCHES)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", REFERENCE)
def test_within_the_budget(isa: str, op: str, dtype: torch.dtype, sample) -> None:
    for case in sample(cases(op, dtype), lambda c: (f"m={c.m}", c.base, c.branch)):
        check(case, *expected(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    for m, base in itertools.product(
        (1, 8, 9, 300), (BASES[1], BASES[4], Base(70, 1040, 64, 256), Base(33, 4160))
    ):
        for op in ("lora_linear_fwd", "lora_linear_bwd"):
            args = Case(op, m, base, ALL._replace(rank=24), dtype).args()
            if op == "lora_linear_bwd":
                args[-1][6] = False  # dense weights' own gradient is left to torch
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append([bits(t) for t in getattr(native_ops, op)(*args)])
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), (op, m, base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [3, 40])
def test_one_gradient_at_a_time(isa: str, m: int, dtype: torch.dtype) -> None:
    for base in (BASES[0], BASES[4]):
        args = Case("lora_linear_bwd", m, base, ALL, dtype).args()
        together = native_ops.lora_linear_bwd(*args)
        for i, need in enumerate(args[-1]):
            alone = native_ops.lora_linear_bwd(*args[:-1], [need and i == j for j in range(7)])
            assert torch.equal(bits(alone[i]), bits(together[i])), i
            assert all(alone[j].numel() == 0 for j in range(7) if i != j)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_any_strides(isa: str, dtype: torch.dtype) -> None:
    for m, base in itertools.product((5, 20), (BASES[0], BASES[2])):
        x, *rest = Case("lora_linear_fwd", m, base, ALL, dtype).args()
        contiguous = native_ops.lora_linear_fwd(x.contiguous(), *rest)
        spread = x.new_zeros(m, 2 * x.shape[1])[:, ::2].copy_(x)
        for other in (x.T.contiguous().T, spread, x):
            got = native_ops.lora_linear_fwd(other, *rest)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, contiguous, strict=True))
        dy, *rest = Case("lora_linear_bwd", m, base, ALL, dtype).args()
        ones = torch.ones(m, dy.shape[1], dtype=dtype)
        expanded = native_ops.lora_linear_bwd(ones[:1, :1].expand_as(ones), *rest)
        whole = native_ops.lora_linear_bwd(ones, *rest)
        for a, b in zip(expanded[:6], whole[:6], strict=True):
            assert torch.equal(bits(a), bits(b))


def test_bad_arguments_touch_no_memory(isa: str) -> None:
    case = Case("lora_linear_bwd", 4, BASES[0], BRANCHES[3], torch.float32)
    dy, x, s, *rest = case.args()
    calls = {
        r"dy: got shape \[4, 64\], expected \[any, 65\]": (dy[:, :64], x, s),
        r"x: got shape \[4, 66\]": (dy, x[:, :66], s),
        r"s: got shape \[4, 63\]": (dy, x, s[:, :63]),
        r"dy: got 3 rows": (dy[:3], x, s),
        r"dy: got float16, x float32": (dy.half(), x, s),
        r"dy: got dtype float64": (dy.double(), x.double(), s.double()),
    }
    for message, tensors in calls.items():
        with pytest.raises(ValueError, match=message):
            native_ops.lora_linear_bwd(*tensors, *rest)
    x, base, meta, *rest = Case("lora_linear_fwd", 4, BASES[0], BRANCHES[3], torch.float32).args()
    with pytest.raises(ValueError, match=r"weight: has stride 65 along its rows"):
        native_ops.lora_linear_fwd(x, [base[0].T.contiguous().T], meta, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_meets_the_weight_that_dequantize_gives(isa: str, dtype: torch.dtype) -> None:
    """One rounding rule for every M: x that picks a column brings out exactly its weights."""
    n, k = 512, 128
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=generator)
    mantissa = 1 + torch.rand(n * k // 64, generator=generator)
    for low, high in ((-8, 8), (-90, 90), (-126, -101), (101, 120)):
        if dtype is torch.float16 and high > 14:
            continue
        exponent = torch.randint(low, high, mantissa.shape, generator=generator)
        base, meta = [codes, torch.ldexp(mantissa, exponent)], [n, k, 64, 0, 0]
        w = native_ops.nf4_dequantize(base, meta, dtype)
        for column in range(k):
            x = torch.zeros(1, k, dtype=dtype)
            x[0, column] = 1
            y = native_ops.nf4_linear_fwd(x, base, meta, None)
            assert torch.equal(y[0], w[:, column]), (low, high, column)
