"""Derivatives that are carried forward: an error, where zeros would come back without a word."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from lora_kernels.dispatch import ops
from tests.ops.inputs import cases
from tests.ops.public_calls import CALLS, Call

calls = pytest.mark.parametrize("call", CALLS, ids=str)
# Ours, or torch's own where an autograd function is asked.
refused = pytest.raises((NotImplementedError, RuntimeError), match=r"forward.mode|jvp")


@calls
@pytest.mark.parametrize("frozen", [True, False])
def test_dual_numbers(call: Call, frozen: bool):
    t, fixed = call.tensors(), call.fixed()
    for name, value in t.items():
        with forward_ad.dual_level():
            given = {n: v.detach().requires_grad_(not frozen) for n, v in t.items()}
            given[name] = forward_ad.make_dual(value.detach(), torch.ones_like(value))
            with refused:
                call.outputs(given, fixed)


@calls
def test_torch_func_jvp(call: Call):
    t, fixed = {n: v.detach() for n, v in call.tensors().items()}, call.fixed()
    for name, value in t.items():
        with refused:
            torch.func.jvp(
                lambda v, name=name: call.outputs({**t, name: v}, fixed),
                (value,),
                (torch.ones_like(value),),
            )


@pytest.mark.parametrize("op", sorted(ops()))
def test_the_ops_themselves(op: str):
    case = next(c for c in cases(op) if c.core)
    args = list(case.build())
    with forward_ad.dual_level():
        for i, arg in enumerate(args):
            values = arg if isinstance(arg, list) else [arg]
            floats = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
            if not floats:
                continue
            dual = [
                forward_ad.make_dual(v, torch.ones_like(v))
                if isinstance(v, torch.Tensor) and v.is_floating_point()
                else v
                for v in values
            ]
            given = [*args[:i], dual if isinstance(arg, list) else dual[0], *args[i + 1 :]]
            with refused:
                getattr(torch.ops.lora_kernels, op)(*given)


@calls
def test_numbers_without_a_derivative_are_left_alone(call: Call):
    t, fixed = {n: v.detach() for n, v in call.tensors().items()}, call.fixed()
    want = call.outputs(t, fixed)
    with forward_ad.dual_level():
        assert all(map(torch.equal, call.outputs(t, fixed), want))
