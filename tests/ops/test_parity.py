"""Every implementation of every op against the reference, over every input of `inputs.py`.

Ops that only move bits must agree exactly; the others through the package's one error budget.
"""

from __future__ import annotations

import pytest

from lora_kernels.dispatch import ops
from tests.ops.case import Case
from tests.ops.grid import grid
from tests.ops.inputs import GENERATORS, cases
from tests.ops.parity import assert_agrees
from tests.ops.variants import DEVICES, Variant, accepts, variants_of


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
    assert_agrees(case, variant.device, variant.active, repeat=repeat)
