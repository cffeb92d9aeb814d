"""Every implementation of every op against the reference, over every input of `inputs.py`.

Ops that only move bits must agree exactly; the others through the package's one error budget.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels.dispatch import ops
from lora_kernels.testing import assert_within_budget
from tests.ops.case import Case
from tests.ops.grid import grid
from tests.ops.inputs import GENERATORS, cases
from tests.ops.parity import assert_agrees, hold_draws
from tests.ops.variants import DEFAULT, DEVICES, Variant, accepts, variants_of


def _parameters():
    """Every case that a variant takes; what it takes may depend on the instruction set in use."""
    for op in GENERATORS:
        built = {device: [(c, c.build(device)) for c in cases(op)] for device in DEVICES}
        for variant in variants_of(op):
            marks = [pytest.mark.gpu] if variant.device == "cuda" else []
            with variant.active():
                for case, args in built[variant.device]:
                    if variant.takes(case) and accepts(op, variant.backend, args):
                        name = f"{op}-{variant}-{case.label}"
                        mark = grid(case, args, variant)
                        yield pytest.param(variant, case, id=name, marks=[mark, *marks])


def test_every_op_has_inputs():
    assert sorted(GENERATORS) == sorted(ops())


def test_labels_are_unique():
    for op in GENERATORS:
        labels = [case.label for case in cases(op)]
        assert len(labels) == len(set(labels))


@pytest.mark.parametrize("op", GENERATORS)
def test_reference_takes_everything(op):
    for case in cases(op):
        assert accepts(op, "reference", case.build()), case.label


@pytest.mark.parametrize(("variant", "case"), list(_parameters()))
def test_against_reference(variant: Variant, case: Case):
    # The interpreter works in one order: a second run would prove nothing.
    repeat = (variant.backend, variant.device) != ("triton", "cpu")
    short = variant.backend == DEFAULT
    assert_agrees(case, variant.device, variant.active, repeat=repeat, short=short)


# --- the judgement itself: what is wrong here would pass if draws were only held together ---------


def _draws(count: int, size: int):
    """A product that rounds, drawn again and again."""
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, w = torch.randn(1, 96, generator=g), torch.randn(size, 96, generator=g)
        x, w = x.bfloat16(), w.bfloat16()
        parts = [x[:, i::4] @ w[:, i::4].T for i in range(4)]
        plain = parts[0] + parts[1] + parts[2] + parts[3]
        yield (x.float() @ w.float().T).bfloat16(), x.double() @ w.double().T, plain


@pytest.mark.parametrize(("count", "size"), [(1, 64), (32, 2), (256, 1), (256, 8), (3, 0)])
def test_right_draws_pass(count: int, size: int):
    draws = list(_draws(count, size))
    hold_draws(draws)
    hold_draws([(plain, oracle, plain) for _, oracle, plain in draws])


def test_a_draw_that_is_wrong_throughout_is_not_lost_among_many():
    draws = list(_draws(256, 8))
    got, oracle, plain = draws[200]
    worst = max((p.double() - o).square().mean().sqrt() for _, o, p in draws)
    off = 1.2 * (2 * worst + 2.0**-9 * oracle.square().mean().sqrt())
    draws[200] = (oracle + off).to(got.dtype), oracle, plain
    together = [torch.stack(t) for t in zip(*draws, strict=True)]
    assert_within_budget(*together)
    with pytest.raises(AssertionError, match=r"rms error .* of draw 200 of 256"):
        hold_draws(draws)


def test_a_small_draw_has_its_own_rounding():
    """Where plain PyTorch is exact, what a large draw may round is not a small one's to take."""
    big, small = torch.full((1, 4), 1024.0), torch.full((1, 4), 1.0)
    draws = [(big, big.double(), big), (small + 2**-20, small.double(), small)]
    together = [torch.stack(t) for t in zip(*draws, strict=True)]
    assert_within_budget(*together)
    with pytest.raises(AssertionError, match=r"largest error .* of draw 1 of 2"):
        hold_draws(draws)
