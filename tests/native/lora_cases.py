"""One call of a native linear op: everything that tells it from another, and its arguments.

A case prints as the Python that makes it again, and makes the same values every time.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.dispatch import ops
from lora_kernels.ops.common.rank import rank_value
from lora_kernels.testing import assert_within_budget
from tests.ops.variants import as_tuple
from tools.op_inputs.calls import oracle_args
from tools.op_inputs.source import strided

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _reference(op: str, *args: Any) -> Any:
    entry = ops()[op]
    return entry.implementations["reference"].fn(entry.call(*args))


REFERENCE = {
    op: functools.partial(_reference, op)
    for op in ("nf4_linear_fwd", "nf4_linear_bwd", "lora_linear_fwd", "lora_linear_bwd")
}
# A budget of few random elements is decided by luck: results are judged over this many.
ELEMENTS = 256


class Base(NamedTuple):
    """W [N, K]; `block` 0 is a dense one, `nested` 0 has fp32 scales, `quant_type` 1 is FP4."""

    n: int
    k: int
    block: int = 0
    nested: int = 0
    quant_type: int = 0


class Branch(NamedTuple):
    """What a LoRA call has besides x and W; adapters are of x's type unless told otherwise."""

    rank: int
    dropout_p: float = 0.0
    rank_diag: bool = False
    out_diag: bool = False
    bias: bool = False
    adapters: torch.dtype | None = None
    scale: float = 0.75


@dataclass(frozen=True)
class Case:
    """`activations` and `parameters` name strides (see `strided`); `threads` 0 leaves the number
    alone; `needs` None asks for every gradient that there is."""

    op: str
    m: int
    base: Base
    branch: Branch
    dtype: torch.dtype
    activations: str = "padded-rows"
    parameters: str = "padded-rows"
    needs: tuple[bool, ...] | None = None
    threads: int = 0

    def args(self, draw: int = 0) -> list[Any]:
        """The op's arguments; another `draw` has other values and the same metadata."""
        n, k = self.base.n, self.base.k
        rank, p, rank_diag, out_diag, bias, adapters, scale = self.branch
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self!r}{draw}".encode()))

        def normal(*shape: int, dtype: torch.dtype = self.dtype, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype)

        def laid_out(t: Tensor, kind: str) -> Tensor:
            return t if kind == "contiguous" else strided(t, kind)

        def rows(columns: int) -> Tensor:
            return laid_out(normal(self.m, columns), self.activations)

        base, meta = make_base(self.base, self.dtype, generator)
        if self.base.block == 0:
            base = [laid_out(base[0], self.parameters)]
        x, dy = rows(k), rows(n)
        b_ = normal(n) if bias else None
        if self.op == "nf4_linear_fwd":
            return [x, base, meta, b_]
        if self.op == "nf4_linear_bwd":
            return [dy, base, meta]
        adapters = adapters or self.dtype
        a = laid_out(normal(rank, k, dtype=adapters, std=k**-0.5), self.parameters)
        b = laid_out(normal(n, rank, dtype=adapters, std=rank**-0.5), self.parameters)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator) if p else None
        d = normal(rank, dtype=adapters) if rank_diag else None
        g = normal(n, dtype=adapters) if out_diag else None
        if self.op == "lora_linear_fwd":
            return [x, base, meta, a, b, scale, b_, p, seed, d, g]
        s = rank_value(normal(self.m, rank, dtype=torch.float32), self.dtype)
        s = laid_out(s, self.activations)
        return [dy, x, s, base, meta, a, b, scale, p, seed, d, g, list(self.wanted())]

    def wanted(self) -> tuple[bool, ...]:
        """`needs` of the backward: x, a, b, bias, rank_diag, out_diag, weight."""
        if self.needs is not None:
            return self.needs
        branch = self.branch
        diagonals = (branch.rank_diag, branch.out_diag)
        return (True, True, True, branch.bias, *diagonals, self.base.block == 0)

    @property
    def draws(self) -> int:
        """How often to repeat the case, for `ELEMENTS` of its smallest result."""
        m, n, k, r = self.m, self.base.n, self.base.k, self.branch.rank
        if self.op == "lora_linear_bwd":
            # ds [M, R] is no result, but its few errors are what da and dx repeat.
            sizes = (m * k, r * k, n * r, n, r, n, n * k, m * r)
            wanted = self.wanted()
            small = min(itertools.compress(sizes, (*wanted, any(wanted[:2]))), default=ELEMENTS)
        else:
            out = m * k if self.op == "nf4_linear_bwd" else m * n
            small = min(out, m * r) if self.op == "lora_linear_fwd" else out
        return 1 if m == 0 else -(-ELEMENTS // min(ELEMENTS, small))


def make_base(
    base: Base, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[int]]:
    """Any bytes are a weight: codes and scales are drawn, not encoded."""
    n, k, block, nested, quant_type = base
    if block == 0:
        return [(torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)], [n, k]
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


Results = tuple[Tensor, ...]


def expected(case: Case) -> tuple[Results, Results]:
    """oracle, plain: every result, stacked over the draws. A 4-bit base of the oracle is decoded
    to x's type first."""
    reference = REFERENCE[case.op]
    draws = [case.args(i) for i in range(case.draws)]
    oracle = [as_tuple(reference(*oracle_args(case.op, args))) for args in draws]
    return _stack(oracle), _stack([as_tuple(reference(*args)) for args in draws])


def check(case: Case, oracle: Results, plain: Results) -> None:
    """Hold the native op, on the instruction set in use, to the budget.

    Raises:
        AssertionError: a result is over it; the message begins with the case.
    """
    call = getattr(torch.ops.lora_kernels_native, case.op).default
    names = [r.name or "output" for r in call._schema.returns]
    actual = _stack([as_tuple(call(*case.args(i))) for i in range(case.draws)])
    for name, *results in zip(names, actual, oracle, plain, strict=True):
        assert_within_budget(*results, f"{case}: {name}")


def _stack(draws: list[Results]) -> Results:
    return tuple(torch.stack(t) for t in zip(*draws, strict=True))
