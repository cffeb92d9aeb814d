"""Selection of a backend: order, refusals, no fallback where one was asked for, and its words."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lora_kernels import NF4Weight, explain, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch import (
    BACKENDS,
    BackendError,
    Implementation,
    chosen,
    define,
    ops,
    register,
    registry,
)

X = torch.zeros(2, 3)


class Call(NamedTuple):
    x: Tensor

    def fake(self) -> Tensor:
        return torch.empty_like(self.x)


def _accepts(call):
    return None


def _refuses_2d(call):
    return "takes 1-D x" if call.x.dim() == 2 else None


@pytest.fixture(autouse=True)
def _automatic():
    """These tests choose the backend themselves, whatever the environment asks for."""
    with use_backend(None):
        yield


@pytest.fixture(scope="module")
def op():
    """An op with three backends: native refuses 2-D x, each adds its own number."""
    name = "registry_test"
    define(name, "Tensor", flops=None)(Call)
    supports = {"native": _refuses_2d, "triton": _accepts, "reference": _accepts}
    for number, backend in enumerate(reversed(BACKENDS)):
        fn = lambda call, number=number: call.x + number  # noqa: E731
        register(name, Implementation(backend, fn, supports[backend]))
    yield name
    del registry._ops[name]


def _run(op, x=X):
    return int(getattr(torch.ops.lora_kernels, op)(x).flatten()[0])


def test_order_of_backends(op):
    assert BACKENDS == ("native", "triton", "reference")
    assert [i.backend for i in ops()[op].in_order()] == list(BACKENDS)


def test_first_backend_that_does_not_refuse(op):
    assert _run(op) == 1 and chosen(op, X) == "triton"
    assert _run(op, X[0]) == 2 and chosen(op, X[0]) == "native"


def test_use_backend_is_obeyed(op):
    for number, backend in enumerate(reversed(BACKENDS)):
        with use_backend(backend):
            assert _run(op, X[0]) == number
    assert _run(op, X[0]) == 2


def test_use_backend_never_falls_back(op):
    with use_backend("native"), pytest.raises(BackendError) as caught:
        _run(op)
    text = str(caught.value)
    assert text.startswith("registry_test: no backend (native was asked for)")
    assert "native    takes 1-D x" in text and "triton    accepts" in text


def test_a_backend_without_the_op_never_falls_back(op, monkeypatch):
    monkeypatch.delitem(ops()[op].implementations, "triton")
    with use_backend("triton"):
        with pytest.raises(BackendError, match="triton    has no implementation of this op"):
            _run(op)
        assert chosen(op, X) is None
    assert _run(op) == 0


def test_every_backend_refuses(op, monkeypatch):
    for backend in ("triton", "reference"):
        refusing = Implementation(backend, lambda call: call.x, lambda call: "is tired")
        monkeypatch.setitem(ops()[op].implementations, backend, refusing)
    with pytest.raises(
        BackendError,
        match="registry_test: no backend\n  native    takes 1-D x\n  triton    is tired",
    ):
        _run(op)


def test_nested_use_backend(op):
    with use_backend("reference"):
        with use_backend("triton"):
            assert _run(op) == 1
            with use_backend(None):
                assert _run(op, X[0]) == 2
            assert _run(op) == 1
        assert _run(op) == 0
    assert _run(op, X[0]) == 2


def test_use_backend_ends_after_an_error(op):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert _run(op, X[0]) == 2


@pytest.mark.parametrize("name", ["cuda", "", "Native", "reference "])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=r"backend: got .*, expected one of native, triton, ref"):
        use_backend(name).__enter__()
    with pytest.raises(ValueError, match="backend: got"):
        Implementation(name, _accepts, _accepts)


def test_unknown_op():
    for call in (explain, chosen):
        with pytest.raises(ValueError, match=r"op: got 'nothing', expected one of .*dropout_mask"):
            call("nothing", X)
    with pytest.raises(ValueError, match="op: got 'nothing'"):
        register("nothing", Implementation("native", _accepts, _accepts))


def test_duplicates_are_refused(op):
    with pytest.raises(ValueError, match="op 'registry_test' is already defined"):
        define(op, "Tensor", flops=None)(Call)
    with pytest.raises(ValueError, match="backend 'reference' is already registered"):
        register(op, Implementation("reference", _accepts, _accepts))


def test_ops_is_a_copy():
    ops().clear()
    assert "lora_linear_fwd" in ops()


def test_native_twin_has_the_same_schema(op):
    for name in ops():
        ours = getattr(torch.ops.lora_kernels, name).default._schema
        twin = getattr(torch.ops.lora_kernels_native, name).default._schema
        assert str(ours).partition("(")[2] == str(twin).partition("(")[2]


def test_supports_reads_metadata_only(op):
    """Meta tensors have no data: a `supports` that reads values fails here."""
    from tests.ops.inputs import GENERATORS, cases

    for name in GENERATORS:
        case = next(c for c in cases(name) if c.core)
        for implementation in ops()[name].in_order():
            answer = implementation.supports(ops()[name].call(*case.build("meta")))
            assert answer is None or isinstance(answer, str)


# --- explain --------------------------------------------------------------------------------------


def test_explain_an_op(op):
    (explanation,) = explain(op, X)
    assert explanation.op == op and explanation.chosen == "triton" and explanation.forced is None
    assert explanation.refusals == {"native": "takes 1-D x", "triton": None, "reference": None}
    assert str(explanation) == (
        "registry_test: triton\n  native    takes 1-D x\n  triton    accepts\n  reference accepts"
    )


def test_explain_under_use_backend(op):
    with use_backend("reference"):
        (explanation,) = explain(op, X)
    assert explanation.chosen == explanation.forced == "reference"
    assert str(explanation).startswith("registry_test: reference (reference was asked for)\n")


def test_explain_a_call_lists_every_op_in_order():
    q = NF4Weight.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64).requires_grad_()

    def step():
        F.nf4_linear(x, q).sum().backward()

    assert [e.op for e in explain(step)] == ["nf4_linear_fwd", "nf4_linear_bwd"]
    with use_backend("reference"):
        assert {e.chosen for e in explain(step)} == {"reference"}


def test_explain_a_module_with_arguments(op):
    class Module(torch.nn.Module):
        def forward(self, x, times=1):
            for _ in range(times):
                x = getattr(torch.ops.lora_kernels, op)(x)
            return x

    assert [e.chosen for e in explain(Module(), X, times=3)] == ["triton"] * 3


def test_explain_nests_and_ends_after_an_error(op):
    def inner():
        assert len(explain(lambda: _run(op))) == 1
        _run(op)

    assert len(explain(inner)) == 1

    def fails():
        _run(op)
        raise KeyError

    with pytest.raises(KeyError):
        explain(fails)
    assert registry._log.get() is None


def test_explain_reports_what_raised(op):
    """The call that no backend takes still raises."""
    with use_backend("native"), pytest.raises(BackendError):
        explain(lambda: _run(op))


# --- the environment ------------------------------------------------------------------------------

PROGRAM = """
import torch
from lora_kernels import NF4Weight, explain
q = NF4Weight.quantize(torch.ones(2, 64), double_quant=False)
print(*explain("nf4_dequantize", q.base, q.meta, torch.float32), sep="\\n")
"""


def _python(program, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**clean, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable_forces_a_backend():
    done = _python(PROGRAM, LORA_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nf4_dequantize: reference (reference was asked for)\n")


def test_environment_variable_never_falls_back():
    done = _python(PROGRAM, LORA_KERNELS_BACKEND="native", LORA_KERNELS_NO_NATIVE="1")
    assert done.returncode != 0
    assert "BackendError: nf4_quantize: no backend (native was asked for)" in done.stderr
    assert "LORA_KERNELS_NO_NATIVE is set" in done.stderr


def test_unknown_backend_in_the_environment():
    done = _python("import lora_kernels", LORA_KERNELS_BACKEND="fast")
    assert done.returncode != 0
    expected = "LORA_KERNELS_BACKEND: got 'fast', expected one of native, triton, reference"
    assert f"ValueError: {expected}" in done.stderr


def test_empty_environment_variable_is_no_choice():
    done = _python(PROGRAM, LORA_KERNELS_BACKEND="")
    assert done.returncode == 0, done.stderr
    assert "was asked for" not in done.stdout
