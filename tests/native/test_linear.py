"""The linear layers on every instruction set, over shapes that divide nothing.

Errors are held to the package's budget; the oracle has its 4-bit base decoded to x's dtype first.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.ops.lora import reference as lora
from lora_kernels.ops.nf4 import reference as nf4
from lora_kernels.testing import assert_within_budget
from tests.ops.variants import as_tuple, bits, oracle_args

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
native_ops = torch.ops.lora_kernels_native
REFERENCE = {
    "nf4_linear_fwd": nf4.linear_fwd,
    "nf4_linear_bwd": nf4.linear_bwd,
    "lora_linear_fwd": lora.lora_linear_fwd,
    "lora_linear_bwd": lora.lora_linear_bwd,
}

# Either side of the crossovers between kernels, of a tile of rows, of a block of rows.
ROWS = (0, 1, 2, 7, 8, 9, 16, 17, 33, 130)

# N, K, block size (0: dense), nested block (0: not nested), quant type. Blocks that straddle rows,
# rows that begin in the middle of a byte, one block for many rows, more than one chunk of K and N.
BASES = (
    (65, 67, 0, 0, 0),
    (131, 320, 0, 0, 0),
    (66, 128, 64, 256, 0),
    (37, 129, 64, 0, 0),
    (300, 576, 64, 256, 0),
    (9, 96, 32, 4, 1),
    (21, 192, 4096, 0, 0),
    (33, 4160, 4096, 4, 1),
    (1, 77, 64, 256, 1),
    (130, 1, 64, 0, 0),
)
# rank, dropout p, rank_diag, out_diag, bias, adapters in fp32
BRANCHES = (
    (16, 0.0, False, False, False, True),
    (1, 0.5, False, True, True, False),
    (17, 0.1, True, False, True, True),
    (64, 0.05, True, True, False, False),
)


@dataclass(frozen=True)
class Case:
    op: str
    m: int
    base: tuple[int, int, int, int, int]
    branch: tuple[int, float, bool, bool, bool, bool]
    dtype: torch.dtype

    def args(self, draw: int = 0) -> list[Any]:
        """The op's arguments; x and dy are views with a row stride of their own."""
        n, k, *_ = self.base
        rank, p, rank_diag, out_diag, bias, wide = self.branch
        generator = torch.Generator().manual_seed(1000 * self.m + n + k + draw)

        def normal(*shape: int, dtype: torch.dtype = self.dtype, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype)

        def rows(columns: int) -> Tensor:
            return normal(self.m, columns + 5)[:, 2 : columns + 2]

        base, meta = make_base(self.base, self.dtype, generator)
        x, dy = rows(k), rows(n)
        b_ = normal(n) if bias else None
        if self.op == "nf4_linear_fwd":
            return [x, base, meta, b_]
        if self.op == "nf4_linear_bwd":
            return [dy, base, meta]
        adapters = torch.float32 if wide else self.dtype
        a = normal(rank, k, dtype=adapters, std=k**-0.5)
        b = normal(n, rank, dtype=adapters, std=rank**-0.5)
        seed = torch.tensor([self.m - 77]) if p else None
        d = normal(rank, dtype=adapters) if rank_diag else None
        g = normal(n, dtype=adapters) if out_diag else None
        if self.op == "lora_linear_fwd":
            return [x, base, meta, a, b, 0.75, b_, p, seed, d, g]
        s = normal(self.m, rank)
        needs = [True, True, True, bias, rank_diag, out_diag, len(base) == 1]
        return [dy, x, s, base, meta, a, b, 0.75, p, seed, d, g, needs]

    @functools.cached_property
    def draws(self) -> int:
        """A budget of few random elements is decided by luck: at least 256 of each result."""
        sizes = [t.numel() for t in as_tuple(REFERENCE[self.op](*self.args())) if t.numel()]
        return min(256, -(-256 // min(sizes, default=256)))


def make_base(
    base: tuple[int, int, int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[int]]:
    n, k, block, nested, quant_type = base
    if block == 0:
        w = torch.randn(n, k + 3, generator=generator) * k**-0.5
        return [w.to(dtype)[:, :k]], [n, k]
    blocks = -(-n * k // block)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8, generator=generator)
    scale = 2 * k**-0.5
    meta = [n, k, block, quant_type, nested]
    if nested == 0:
        return [packed, torch.rand(blocks, generator=generator) * scale], meta
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-blocks // nested), generator=generator) * scale
    code_map = torch.rand(256, generator=generator)
    return [packed, codes, absmax, code_map, torch.tensor([0.1 * scale])], meta


# Cached: every tier is compared with the same expectation.
@functools.cache
def expected(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """plain, oracle: every result, stacked over the draws."""
    reference = REFERENCE[case.op]
    plain, oracle = [], []
    for draw in range(case.draws):
        args = case.args(draw)
        plain.append(as_tuple(reference(*args)))
        oracle.append(as_tuple(reference(*oracle_args(case.op, args))))
    return _stack(plain), _stack(oracle)


def _stack(draws: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(t) for t in zip(*draws, strict=True))


def cases(op: str, dtype: torch.dtype):
    bases = [b for b in BASES if b[2] or op.startswith("lora")]
    for i, (m, base) in enumerate(itertools.product(ROWS, bases)):
        yield Case(op, m, base, BRANCHES[(i + i // len(bases)) % len(BRANCHES)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", REFERENCE)
def test_within_the_budget(isa: str, op: str, dtype: torch.dtype) -> None:
    names = [r.name or "output" for r in getattr(native_ops, op).default._schema.returns]
    for case in cases(op, dtype):
        call = getattr(native_ops, op)
        actual = _stack([as_tuple(call(*case.args(i))) for i in range(case.draws)])
        for name, *results in zip(names, actual, *reversed(expected(case)), strict=True):
            assert_within_budget(*results, f"{case}: {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    branch = (24, 0.1, True, True, True, True)
    for m, base in itertools.product((1, 8, 9, 300), (BASES[1], BASES[4], (70, 1040, 64, 256, 0))):
        for op in ("lora_linear_fwd", "lora_linear_bwd"):
            args = Case(op, m, base, branch, dtype).args()
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
        args = Case("lora_linear_bwd", m, base, (8, 0.1, True, True, True, True), dtype).args()
        together = native_ops.lora_linear_bwd(*args)
        for i, need in enumerate(args[-1]):
            alone = native_ops.lora_linear_bwd(*args[:-1], [need and i == j for j in range(7)])
            assert torch.equal(bits(alone[i]), bits(together[i])), i
            assert all(alone[j].numel() == 0 for j in range(7) if i != j)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_any_strides(isa: str, dtype: torch.dtype) -> None:
    branch = (8, 0.1, True, True, True, True)
    for m, base in itertools.product((5, 20), (BASES[0], BASES[2])):
        x, *rest = Case("lora_linear_fwd", m, base, branch, dtype).args()
        contiguous = native_ops.lora_linear_fwd(x.contiguous(), *rest)
        spread = x.new_zeros(m, 2 * x.shape[1])[:, ::2].copy_(x)
        for other in (x.T.contiguous().T, spread, x):
            got = native_ops.lora_linear_fwd(other, *rest)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, contiguous, strict=True))
        dy, *rest = Case("lora_linear_bwd", m, base, branch, dtype).args()
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
