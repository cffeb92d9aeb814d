"""The emulator's own tests (`tools/ptxemu/tests`), on which every other result here stands.

Those that need no Triton: its README says how the sweeps over Triton's products are run, for half
an hour.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from tests.compiled.families import on_another_release
from tools.gpu_proofs import emulator

pytest.importorskip("triton", reason="triton is not installed")
if emulator.missing() is not None:
    pytest.skip(emulator.missing() or "", allow_module_level=True)

if on_another_release():
    pytest.skip("tested with the release of every commit", allow_module_level=True)
# Files, and the tests in each.
FILES = {
    "isa": (("isa_integers", "isa_floats", "isa_warps"), "test_"),
    "cuda": (("cuda",), "test_"),
    "tma": (("tma_cuda",), "test_cuda"),
}


def _parameters():
    nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
    for name, (files, prefix) in FILES.items():
        marks = [pytest.mark.grid(name)] + ([nvcc] if name != "isa" else [])
        for file in files:
            for key, value in vars(import_module(f"tools.ptxemu.tests.test_{file}")).items():
                if key.startswith(prefix) and isinstance(value, Callable):
                    yield pytest.param(value, id=f"{name}-{key}", marks=marks)


@pytest.mark.parametrize("function", list(_parameters()))
def test_emulator(function: Any):
    try:
        function()
    except SystemExit as failed:  # as those scripts say that something was accepted
        raise AssertionError(failed) from failed
