from __future__ import annotations

import pytest

from lora_kernels.dispatch import native


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`isa` runs a test under every tier that was compiled, one after the other, so that they share
    an expectation while it is kept."""
    if "isa" in metafunc.fixturenames:
        names = native.build_info()["isas"] if native.available() else ["any"]
        metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    if not native.available():
        pytest.skip(f"needs the extension: {native.why_unavailable()}")
    if request.param not in native.isas():
        pytest.skip(f"this machine does not offer the instructions of {request.param}")
    with native.use_isa(request.param):
        yield request.param
