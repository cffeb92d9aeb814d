"""Loading of lora_kernels._C and control of the instruction set."""

from __future__ import annotations

import importlib

import pytest
import torch

from lora_kernels.dispatch import native

needs_extension = pytest.mark.skipif(
    not native.available(), reason=f"needs the extension: {native.why_unavailable()}"
)


def load_again() -> native._Loaded:
    return native._load.__wrapped__()


@needs_extension
def test_build_info() -> None:
    info = native.build_info()
    assert set(info) == {
        "compiler",
        "flags",
        "torch",
        "isas",
        "cuda",
        "cuda_archs",
        "without_cuda",
    }
    assert bool(info["cuda_archs"]) == bool(info["cuda"]) == (not info["without_cuda"])
    assert info["isas"][-1] == "scalar"
    assert set(native.isas()) <= set(info["isas"])
    assert "-march" not in info["flags"]
    assert "-ffast-math" not in info["flags"]
    assert native.why_unavailable() is None


@needs_extension
def test_the_best_tier_is_in_use() -> None:
    assert native.current_isa() == native.isas()[0]


@needs_extension
def test_use_isa_restores() -> None:
    before = native.current_isa()
    with native.use_isa("scalar"):
        assert native.current_isa() == "scalar"
    assert native.current_isa() == before
    with pytest.raises(KeyError), native.use_isa("scalar"):
        raise KeyError
    assert native.current_isa() == before


@needs_extension
def test_an_unknown_tier_is_refused() -> None:
    before = native.current_isa()
    message = r"isa: got 'sse9', expected one of .*scalar"
    with pytest.raises(ValueError, match=message), native.use_isa("sse9"):
        pass
    assert native.current_isa() == before


@needs_extension
def test_every_op_of_the_extension_is_defined() -> None:
    """A registration for a name that Python does not define would stay without effect."""
    for op in ("nf4_quantize", "nf4_quantize_scales", "nf4_dequantize", "dropout_mask"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lora_kernels_native::{op}", "CPU")
        assert getattr(torch.ops.lora_kernels_native, op)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_NO_NATIVE", "1")
    assert load_again() == (None, "LORA_KERNELS_NO_NATIVE is set")


def test_torch_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert load_again() == (None, "torch 2.9.1+cpu is older than 2.10")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ModuleNotFoundError("No module named 'lora_kernels._C'", name="lora_kernels._C"),
            "was not built",
        ),
        (ImportError("undefined symbol: torch_call_dispatcher"), "undefined symbol: torch_call"),
        (OSError("libtorch_cpu.so: cannot open shared object file"), "libtorch_cpu.so: cannot"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "No module named 'x'"),
    ],
)
def test_a_broken_extension_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    module, why = load_again()
    assert module is None
    assert why is not None and reason in why


def test_what_is_answered_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: native._Loaded(None, "it is broken"))
    assert not native.available()
    assert native.why_unavailable() == "it is broken"
    assert native.isas() == ()
    for call in (native.build_info, native.current_isa):
        with pytest.raises(RuntimeError, match="it is broken"):
            call()
