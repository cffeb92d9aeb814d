"""What a user hears of a copy of the package that lacks its extension, or the CUDA part of it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from lora_kernels.dispatch import installed

REASON = "lora_kernels was installed without its native backend: cmake was not found on PATH"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package's folder, empty, first on sys.path as a checkout is."""
    monkeypatch.delenv(installed.SWITCH, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "checkout")])
    folder = tmp_path / "checkout" / "lora_kernels"
    folder.mkdir(parents=True)
    return folder


def put_extension(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"_C{EXTENSION_SUFFIXES[0]}").touch()


def put_failure(folder: Path, text: str = REASON) -> None:
    (folder / installed.FAILED).write_text(f"{text}\nfoo.cpp:1: error: and the rest\n")


def test_a_source_tree_that_was_not_built_is_silent(package: Path) -> None:
    assert installed.warning(package) is None
    assert "was not built: build it with" in installed.why_missing(package)


def test_a_built_one_is_silent(package: Path) -> None:
    put_extension(package)
    assert installed.warning(package) is None


def test_a_failed_build_is_told(package: Path) -> None:
    put_failure(package)
    assert installed.warning(package) == installed.why_missing(package)
    assert installed.why_missing(package).startswith(REASON)
    assert "pip install -e ." in installed.why_missing(package)


def test_a_failed_cuda_part_is_told_beside_the_extension(package: Path) -> None:
    put_extension(package)
    put_failure(package, "lora_kernels was installed without its CUDA kernels: a.cu: error")
    assert installed.warning(package).endswith("without its CUDA kernels: a.cu: error")


def test_a_checkout_that_hides_the_installed_package_is_told(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    put_extension(site / "lora_kernels")
    monkeypatch.setattr(sys, "path", [str(package.parent), str(site)])
    said = installed.warning(package)
    assert f"imported from {package}" in said and f"installed in {site / 'lora_kernels'}" in said
    put_extension(package)
    assert installed.warning(package) is None


def test_the_choice_of_no_extension_is_silent(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_failure(package)
    monkeypatch.setenv(installed.SWITCH, "1")
    assert installed.warning(package) is None


def test_the_extension_of_another_python_is_named(package: Path) -> None:
    (package / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    assert "found _C.cpython-39-x86_64-linux-gnu.so" in installed.why_missing(package)


def test_the_warning_is_that_of_the_importing_line(package: Path, monkeypatch) -> None:
    put_failure(package)
    monkeypatch.setattr(installed, "PACKAGE", package)
    monkeypatch.setattr(installed.warning, "__defaults__", (package,))
    monkeypatch.setattr(installed.failure, "__defaults__", (package,))
    with pytest.warns(RuntimeWarning, match="cmake was not found.*LORA_KERNELS_NO_NATIVE=1"):
        installed.warn()


def test_importing_this_tree_warns_only_for_a_reason() -> None:
    """In a process of its own, with warnings as errors."""
    with warnings.catch_warnings():
        reason = installed.warning()
    if reason is not None:
        pytest.skip(f"this copy of the package has something to say: {reason}")
    program = "import warnings; warnings.simplefilter('error'); import lora_kernels"
    root = str(installed.PACKAGE.parent)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert "RuntimeWarning: lora_kernels" not in done.stderr, done.stderr
