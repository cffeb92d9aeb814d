"""The generated grid of linear layers: every tier against the fp64 oracle, by the one budget."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.dispatch import native
from lora_kernels.ops.common.base import BLOCK_SIZES
from tests.native.lora_cases import DTYPES, REFERENCE, Case, check, expected
from tests.native.lora_grid import ACTIVATIONS, CHUNKS, FEW, LONG, RANKS, ROWS, chunk, grid


def test_there_are_three_thousand_distinct_cases() -> None:
    cases = grid()
    assert len({repr(c) for c in cases}) == len(set(cases)) == len(cases) >= 3000
    for op in REFERENCE:
        for dtype in DTYPES:
            parts = [c for i in range(CHUNKS) for c in chunk(op, dtype, i)]
            assert set(parts) == {c for c in cases if (c.op, c.dtype) == (op, dtype)}
            assert {c.threads for c in parts} == {1, 2, 3}
            assert {c.m for c in parts} == set(ROWS)
            assert {c.activations for c in parts} == set(ACTIVATIONS)
            assert {c.base.block for c in parts} >= set(BLOCK_SIZES)
            assert {c.base.n for c in parts} & set(FEW)
            assert {c.base.k for c in parts} & set(FEW)
            assert {c.base.n for c in parts} | {c.base.k for c in parts} >= set(LONG)
            if op.startswith("lora"):
                assert {c.branch.rank for c in parts} == set(RANKS)


def test_fresh_memory_is_nan(isa: str) -> None:
    """What proves that kernels write every element: a result starts as NaN (tests/conftest.py).
    By tier, so that one which this machine lacks, and the grid leaves out, is named."""
    assert isa in native.isas()
    for dtype in DTYPES:
        assert torch.empty(1000, dtype=dtype).isnan().all()
    x, seed = torch.zeros(2, 8), torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: torch.ops.lora_kernels_native.dropout_mask(seed, 2, 8, 0.5, 0),
        lambda: torch.ops.lora_kernels.lora_linear_fwd(
            x, [x], [2, 8], x, x[:, :2].contiguous(), 1.0, None, 0.0, None, None, None
        ),
    ):
        with torch.autograd.profiler.profile() as profile:
            call()
        assert "aten::fill_" in {event.name for event in profile.function_events}


def _features(case: Case) -> list[str]:
    """What every sample has: sizes of none, one, odd and many, strides, threads, block sizes."""
    sizes = {"m": case.m, "n": case.base.n, "k": case.base.k}
    found = [f"{name} is {size}" for name, size in sizes.items() if size < 2]
    found += [f"odd {name}" for name, size in sizes.items() if size % 2]
    found += [f"long {name}" for name, size in sizes.items() if size > 1000]
    return [*found, case.activations, f"{case.threads} threads", f"blocks of {case.base.block}"]


@pytest.mark.parametrize("part", range(CHUNKS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", REFERENCE)
def test_within_the_budget(op: str, dtype: torch.dtype, part: int, sample) -> None:
    """All tiers of this machine in one test: the oracle is what takes the time."""
    if not native.available():
        pytest.skip(f"needs the extension: {native.why_unavailable()}")
    failures = []
    for case in sample(chunk(op, dtype, part), _features):
        if torch.get_num_threads() != case.threads:
            torch.set_num_threads(case.threads)
        oracle, plain = expected(case)
        for isa in native.isas():
            with native.use_isa(isa):
                try:
                    check(case, oracle, plain)
                except AssertionError as error:
                    failures.append(f"{isa}: {error}")
                except (RuntimeError, ValueError) as error:
                    failures.append(f"{isa}: {case}: {type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} failed:\n" + "\n".join(failures[:20])
