"""What runs on a GPU, and its body on the CPU as well, so that no line of it is new to a GPU."""

from __future__ import annotations

import pytest

from tests.ops.variants import interpreting


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[None, "triton"], ids=["chosen", "triton"])
def backend(request: pytest.FixtureRequest, device: str) -> str | None:
    """The backend that is chosen, and Triton's."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if device == "cpu" and not interpreting():
            pytest.skip("Triton's kernels run on CPU tensors under TRITON_INTERPRET=1 alone")
    return request.param
