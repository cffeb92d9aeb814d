"""Releases of Triton that the kernels do not run on: `explain` names them, nothing runs wrongly."""

from __future__ import annotations

import numpy
import pytest
import torch

from lora_kernels import explain, use_backend
from lora_kernels.dispatch import BackendError
from lora_kernels.ops.common import triton_version
from lora_kernels.ops.common.launch import Executor, _Interpreter, use_executor
from tests.interpreter import patch_once

triton = pytest.importorskip("triton", reason="triton is not installed")
OP, ARGS = "dropout_mask", (torch.tensor([1]), 4, 8, 0.5, 0)


class OnCpu(Executor):
    """Takes CPU tensors, and launches nothing."""

    on_cpu = True


@pytest.fixture(autouse=True)
def _asked_anew():
    yield
    triton_version.refuse.cache_clear()
    triton_version.refuse_interpreter.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, module: object, version: str) -> None:
    monkeypatch.setattr(module, "__version__", version)
    triton_version.refuse.cache_clear()
    triton_version.refuse_interpreter.cache_clear()


def refusal() -> str | None:
    (explanation,) = explain(OP, *ARGS)
    return explanation.refusals["triton"]


@pytest.mark.parametrize("version", ["3.4.0", "3.5.1", "2.3.1"])
def test_an_older_release_is_refused_by_its_number(monkeypatch: pytest.MonkeyPatch, version: str):
    with use_executor(OnCpu()):
        pretend(monkeypatch, triton, version)
        assert refusal() == (
            f"takes triton 3.6 or later, not {version}: older ones compile some kernels wrongly"
        )
        with use_backend("triton"), pytest.raises(BackendError, match=version):
            torch.ops.lora_kernels.dropout_mask(*ARGS)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.10.0", "4.0.0+git1234"])
def test_a_later_one_is_taken(monkeypatch: pytest.MonkeyPatch, version: str):
    with use_executor(OnCpu()):
        pretend(monkeypatch, triton, version)
        assert refusal() is None


def test_an_interpreter_that_numpy_breaks_is_refused(monkeypatch: pytest.MonkeyPatch):
    with use_executor(_Interpreter()):
        pretend(monkeypatch, triton, "3.6.0")
        pretend(monkeypatch, numpy, "2.3.5")
        assert refusal() is None
        pretend(monkeypatch, numpy, "2.4.6")
        assert refusal() == "the interpreter of triton 3.6.0 takes numpy below 2.4, not 2.4.6"
        with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1: .*numpy below 2\.4"):
            patch_once()
        pretend(monkeypatch, triton, "3.7.1")
        assert refusal() is None


def test_compiled_kernels_take_any_numpy(monkeypatch: pytest.MonkeyPatch):
    with use_executor(OnCpu()):
        pretend(monkeypatch, triton, "3.6.0")
        pretend(monkeypatch, numpy, "2.4.6")
        assert refusal() is None
