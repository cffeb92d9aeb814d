"""The makers of arguments: values of a seed, and hollow tensors that differ in nothing else."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.dispatch import ops
from tools.op_inputs import MAKERS, arguments
from tools.op_inputs.calls import call, oracle_args
from tools.op_inputs.dora import Dora
from tools.op_inputs.gather import Gather
from tools.op_inputs.glu import Glu
from tools.op_inputs.layer import Codec, Layer
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import BASES, FP32, Hollow, Source

SHAPE = (5, 24, 40, 3)
BY_STEM = {
    "lora_linear": [Layer(SHAPE, base=base, dropout=0.1, bias=True) for base in BASES],
    "nf4_linear": [Layer(SHAPE, base=base) for base in BASES],
    "nf4_": [Codec(24, 41), Codec(7, 31, FP32, (32, False, "fp4"))],
    "dora": [Dora(SHAPE, keep_u=kept, rows="zero flat", dropout=0.3) for kept in (True, False)],
    "lora_packed": [Packed(), Packed(bases=("nf4-nested", "dense", "nf4"), bias=(True,) * 3)],
    "glu": [Glu((5, 24), strides="transposed", need_h=True)],
    "gather": [Gather(base="dense"), Gather(slots="sorted", ranks=(1, 33), padded=True)],
}
# Of one user each: made there.
MADE_ELSEWHERE = {"dropout_mask", "cross_entropy", "linear_cross_entropy"}


def _parameters():
    for op in MAKERS:
        stem = next(s for s in BY_STEM if op.startswith(s))
        for i, made in enumerate(BY_STEM[stem]):
            yield pytest.param(op, made, id=f"{op}-{i}")


def _kinds(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_kinds(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return value


def test_every_op_has_a_maker() -> None:
    assert set(ops()) == {*MAKERS, *MADE_ELSEWHERE}


@pytest.mark.parametrize(("op", "made"), list(_parameters()))
def test_hollow_arguments_are_of_the_same_kinds(op: str, made: object) -> None:
    assert _kinds(arguments(op, made, Source())) == _kinds(arguments(op, made, Hollow()))


@pytest.mark.parametrize(("op", "made"), list(_parameters()))
def test_a_seed_gives_the_same_arguments_again(op: str, made: object) -> None:
    first, again, other = (arguments(op, made, Source(seed)) for seed in (3, 3, 4))
    assert _same(first, again) and not _same(first, other)


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, (list, tuple)):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_outputs_are_named_and_inputs_stay() -> None:
    args = arguments("gather_lora_add", Gather(dtype=FP32), Source())
    before = args[0].clone()
    found = call("gather_lora_add", args)
    assert list(found) == ["out"] and torch.equal(args[0], before)
    assert not torch.equal(found["out"], before)


def test_the_oracle_decodes_a_weight_in_the_type_of_x() -> None:
    args = arguments("lora_linear_fwd", Layer(SHAPE, base="nf4-nested"), Source())
    x, base, meta, *_ = oracle_args("lora_linear_fwd", args)
    assert x.dtype == torch.float64 and meta == [24, 40]
    assert base[0].dtype == torch.float64 and torch.equal(base[0], base[0].bfloat16().double())
