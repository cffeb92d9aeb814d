"""The emulator's own tests (`tools/ptxemu/tests`), on which every other result here stands."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from bench.gpu import emulator
from tests.compiled.families import on_another_release

pytest.importorskip("triton", reason="triton is not installed")
if emulator.missing() is not None:
    pytest.skip(emulator.missing() or "", allow_module_level=True)
emulator.load_emulator()

if on_another_release():
    pytest.skip("tested with the release of every commit", allow_module_level=True)
FILES = ("isa", "cuda", "triton", "tma")


def _module(name: str) -> ModuleType:
    path = emulator.TOOLS / "ptxemu" / "tests" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"ptxemu_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parameters():
    for name in FILES:
        marks = [pytest.mark.grid(name)]
        for key, value in vars(_module(name)).items():
            if not key.startswith("test_") or not isinstance(value, Callable):
                continue
            cuda = name == "cuda" or key.startswith("test_cuda")
            needs = [pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")]
            yield pytest.param(value, id=f"{name}-{key}", marks=[*marks, *needs[: int(cuda)]])


@pytest.mark.parametrize("function", list(_parameters()))
def test_emulator(function: Any):
    try:
        function()
    except SystemExit as failed:  # as those scripts say that something was accepted
        raise AssertionError(failed) from failed
