"""The extension is there, or the machine was told that it is not wanted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.dispatch import chosen, native, ops
from lora_kernels.dispatch.registry import refusal
from tests.ops.inputs import cases

NOT_WANTED = os.environ.get("LORA_KERNELS_NO_NATIVE", "") not in ("", "0")


def test_native_is_available_unless_it_was_switched_off():
    if NOT_WANTED:
        assert native.why_unavailable() == "LORA_KERNELS_NO_NATIVE is set"
        assert not native.available() and native.isas() == ()
    else:
        assert native.why_unavailable() is None
        assert native.available() and native.isas()


def test_without_the_extension_every_op_says_why_and_the_functions_raise():
    """In a process of its own: the extension loads once."""
    program = """
import torch
from lora_kernels import explain
from lora_kernels.dispatch import native
assert not native.available() and native.isas() == ()
for call in (native.build_info, native.current_isa, native.use_isa("scalar").__enter__):
    try:
        call()
    except RuntimeError as error:
        assert "LORA_KERNELS_NO_NATIVE is set" in str(error), error
    else:
        raise AssertionError(call)
(e,) = explain("dropout_mask", torch.tensor([1]), 2, 8, 0.5, 0)
print(e.refusals["native"], e.chosen, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "LORA_KERNELS_NO_NATIVE": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    reason, chosen = done.stdout.strip().split("|")
    assert "LORA_KERNELS_NO_NATIVE is set" in reason and chosen != "native"


WITH_NATIVE = sorted(name for name, op in ops().items() if "native" in op.implementations)


@pytest.mark.parametrize("name", WITH_NATIVE)
def test_native_refuses_other_devices(name):
    args = next(c for c in cases(name) if c.core).build("meta")
    assert refusal(name, "native", *args) is not None


FP32_OR_NONE = {"dropout_mask", "nf4_quantize_scales"}  # no backend is asked to take fp64


@pytest.mark.parametrize("name", [n for n in WITH_NATIVE if n not in FP32_OR_NONE])
def test_native_refuses_float64(name):
    """The reference alone takes fp64: it is the oracle of the error budget."""
    args = [_double(a) for a in next(c for c in cases(name) if c.core).build()]
    assert refusal(name, "native", *args) is not None
    with use_backend(None):
        assert chosen(name, *args) == "reference"


def _double(value):
    if isinstance(value, list):
        return [_double(v) for v in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value
