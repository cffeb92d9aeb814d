"""setup.py: what a build that fails leaves behind, on a project of a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAILED = "lora_kernels/_build_failed.txt"
PYPROJECT = """[project]
name = "lora_kernels"
version = "1"
[tool.setuptools]
packages = ["lora_kernels"]
"""
PROJECT = "cmake_minimum_required(VERSION 3.22)\nproject(small LANGUAGES NONE)\n"
EXTENSION = (
    'add_custom_target(_C COMMAND ${CMAKE_COMMAND} -E echo "for ${LORA_KERNELS_TIERS}" > _C.so)\n'
)
BROKEN = 'message(FATAL_ERROR "no luck; at all")\n'
# As if nvcc had been found, and its code did not compile.
WITHOUT_CUDA_ONLY = (
    'set(CMAKE_CUDA_COMPILER /opt/nvcc CACHE FILEPATH "")\n'
    f'if(NOT LORA_KERNELS_CUDA STREQUAL "OFF")\n{BROKEN}endif()\n'
)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for tool in ("cmake", "ninja"):
        if not (shutil.which(tool) or Path(sys.executable).with_name(tool).exists()):
            pytest.skip(f"{tool} is not on PATH")
    for name in [n for n in os.environ if n.startswith("LORA_KERNELS_")]:
        monkeypatch.delenv(name)
    shutil.copy2(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "lora_kernels").mkdir()
    (tmp_path / "lora_kernels" / "__init__.py").touch()
    return tmp_path


def wheel(checkout: Path, cmake: str, good: bool = True) -> tuple[dict[str, str], str]:
    """Its text files of the package, and what was printed."""
    (checkout / "CMakeLists.txt").write_text(PROJECT + cmake)
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == good, done.stdout
    if not good:
        return {}, done.stdout
    (file,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.startswith("lora_kernels/")]
        return {n: archive.read(n).decode() for n in names}, done.stdout


def test_the_extension_is_in_the_wheel_or_the_reason_why_not(checkout: Path) -> None:
    """One after the other in one checkout: neither is left over from the other."""
    files, said = wheel(checkout, BROKEN)
    first, *rest = files[FAILED].splitlines()
    assert first.startswith("lora_kernels was installed without its native backend: CMake Error at")
    assert first.endswith("(message): no luck; at all")
    assert any("no luck; at all" in line for line in rest) and first in said
    assert not [name for name in files if "_C" in name]

    files, _ = wheel(checkout, EXTENSION)
    assert FAILED not in files and [name for name in files if "_C" in name]

    files, _ = wheel(checkout, BROKEN)
    assert FAILED in files and not [name for name in files if "_C" in name]


def test_cuda_kernels_that_fail_cost_no_more_than_themselves(checkout: Path) -> None:
    files, said = wheel(checkout, WITHOUT_CUDA_ONLY + EXTENSION)
    assert [name for name in files if "_C" in name]
    assert "without its CUDA kernels: CMake Error" in files[FAILED].splitlines()[0]
    assert "building again, without CUDA kernels" in said


def test_cuda_kernels_that_were_asked_for_are_not_left_out(checkout: Path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CMAKE_ARGS", "-DLORA_KERNELS_CUDA=ON")
    files, said = wheel(checkout, WITHOUT_CUDA_ONLY + EXTENSION)
    assert "without its native backend" in files[FAILED] and "building again" not in said


def test_nothing_is_kept_of_what_another_build_was_told(checkout: Path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_CMAKE_ARGS", "-DLORA_KERNELS_TIERS=scalar")
    assert "for scalar\n" in wheel(checkout, EXTENSION)[0].values()
    monkeypatch.delenv("LORA_KERNELS_CMAKE_ARGS")
    assert "for \n" in wheel(checkout, EXTENSION)[0].values()


def test_a_build_that_must_not_fail(checkout: Path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_KERNELS_REQUIRE_NATIVE", "1")
    _, said = wheel(checkout, BROKEN, good=False)
    assert "no luck; at all" in said


def test_no_attempt(checkout: Path, monkeypatch) -> None:
    (checkout / FAILED).write_text("of an earlier attempt")
    monkeypatch.setenv("LORA_KERNELS_NO_NATIVE", "1")
    files, _ = wheel(checkout, BROKEN)
    assert list(files) == ["lora_kernels/__init__.py"] and not (checkout / FAILED).exists()


FIRST_ERROR = """
import setuptools
setuptools.setup = lambda **arguments: None
import setup
for text in (
    "a.cu(3): error: name x is undefined",
    "b.cpp:1:2: fatal error: no.h",
    "nvcc fatal   : Unsupported gpu architecture",
    "collect2: error: ld returned 1",
):
    found = setup.first_error(["[1/2] Building errors.o\\n", text + "\\n", "an error\\n"])
    assert found.split() == text.split(), found
assert setup.first_error(["fine\\n"]) == ""
"""


def test_compilers_words_are_found(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST_ERROR], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
