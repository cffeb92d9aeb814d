"""What every test runs under: fixed seeds, NaN in fresh memory, a fair share of the cores."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import platform
import random
import sys
from pathlib import Path

# Children of a test (the command line, the bench) inherit both: no look-ups on a model hub, and
# no worker takes all the cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, min(2, (os.cpu_count() or 1) // _WORKERS))
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
# Tests with more threads than cores would spend their time waiting busily for each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton warns where the first is unset; what it compiles stays with what else is built.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[1] / "build" / "triton-cache")
)
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_COMPILED = Path(__file__).resolve().parent / "compiled"

import numpy as np  # noqa: E402  (after OMP_NUM_THREADS)
import pytest  # noqa: E402
import torch  # noqa: E402

from tests import sampling  # noqa: E402
from tests.interpreter import patch_once  # noqa: E402
from tests.peak_memory import pytest_sessionfinish as pytest_sessionfinish  # noqa: E402
from tests.peak_memory import pytest_terminal_summary as pytest_terminal_summary  # noqa: E402
from tests.peak_memory import pytest_testnodedown as pytest_testnodedown  # noqa: E402
from tests.sampling import pytest_addoption as pytest_addoption  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(_THREADS)
    # With this pair every torch.empty, from C++ too, comes filled with NaN (integers: the largest
    # value), so an output element that a kernel forgot to write cannot pass for a right one.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    from lora_kernels.dispatch import native

    native.fill_new_tensors(True)  # whose kernels take a shorter way to a new tensor otherwise
    if _INTERPRETING and importlib.util.find_spec("triton"):
        patch_once()


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _INTERPRETING:
        how = "triton: interpreted on the CPU (TRITON_INTERPRET=1); tests/compiled is skipped"
    else:
        how = (
            "triton: compiled; on the CPU the parity tests leave it out (TRITON_INTERPRET=1 has it)"
        )
    return [how, sampling.header(config)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sampling.select(config, items)
    # First what takes long, so that no worker is left alone with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if _INTERPRETING:
        skip = pytest.mark.skip(reason="compiles kernels, which TRITON_INTERPRET=1 forbids")
        for item in items:
            if _COMPILED in item.path.parents:
                item.add_marker(skip)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):  # its keywords hold its folders' names too
            item.add_marker(skip)


@pytest.fixture
def sample(request: pytest.FixtureRequest):
    """`sample(cases, features)`: the part of the cases that this run takes (tests/sampling.py)."""
    part, key = sampling.fraction(request.config), f"{sampling.seed()} {request.node.nodeid}"
    return lambda cases, features: sampling.part_of(cases, part, key, features)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


_TRIMMED_EVERY = 32  # tests
_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def _memory_given_back():
    """A worker runs tests for many minutes: what glibc keeps of each adds up."""
    yield
    linux = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if next(_tests_run) % _TRIMMED_EVERY == 0 and linux:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def _threads_restored():
    """Tests may change the number of threads; the next one starts with the usual number."""
    yield
    if torch.get_num_threads() != _THREADS:
        torch.set_num_threads(_THREADS)
