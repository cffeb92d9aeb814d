"""Every implementation of every op against the reference, over every input of `inputs.py`.

Ops that only move bits must agree exactly; the others through the package's one error budget.
"""

from __future__ import annotations

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.dispatch import ops
from lora_kernels.testing import assert_within_budget
from tests.ops.case import Case
from tests.ops.inputs import GENERATORS, cases
from tests.ops.variants import DEVICES, Variant, accepts, all_variants, as_tuple, bits, oracle_args


def _parameters():
    """Every case that a variant takes; what it takes may depend on the instruction set in use."""
    for op in GENERATORS:
        built = {device: [(c, c.build(device)) for c in cases(op)] for device in DEVICES}
        for variant in all_variants():
            with variant.active():
                for case, args in built[variant.device]:
                    if accepts(op, variant.backend, args):
                        yield pytest.param(variant, case, id=f"{op}-{variant}-{case.label}")


def _flat(args):
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, list):
            yield from _flat(a)


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
    args = case.build(variant.device)
    untouched = case.build(variant.device)
    op = getattr(torch.ops.lora_kernels, case.op).default
    with variant.active():
        actual = as_tuple(op(*args))
        again = as_tuple(op(*args))
    with use_backend("reference"):
        plain = as_tuple(op(*args))

    names = [r.name or "output" for r in op._schema.returns]
    for name, got, repeat in zip(names, actual, again, strict=True):
        assert torch.equal(bits(got), bits(repeat)), f"{name}: differs from run to run"
    for before, after in zip(_flat(untouched), _flat(args), strict=True):
        assert torch.equal(bits(before), bits(after)), "an input was overwritten"

    if case.exact:
        for name, got, want in zip(names, actual, plain, strict=True):
            assert got.dtype == want.dtype, name
            assert torch.equal(bits(got), bits(want)), name
        return
    results = [_run(op, case, variant, draw) for draw in range(_draws(plain))]
    for name, *outputs in zip(names, *results, strict=True):
        assert_within_budget(*(torch.stack(t) for t in zip(*outputs, strict=True)), name)


def _run(op, case, variant, draw):
    """Each output as (the variant's, the oracle's, the plain one's)."""
    args = case.build(variant.device, draw)
    with variant.active():
        actual = as_tuple(op(*args))
    with use_backend("reference"):
        plain = as_tuple(op(*args))
        oracle = as_tuple(op(*oracle_args(case.op, args)))
    return list(zip(actual, oracle, plain, strict=True))


def _draws(outputs) -> int:
    """How often to repeat a case with other values. The budget compares two errors that are both
    random; over a few elements the plain one can be small by luck."""
    smallest = min((t.numel() for t in outputs if t.numel()), default=64)
    return min(32, -(-64 // smallest))
