"""What the tools make of what they find; the tools themselves run by `make cuda-build, matrix`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools import cuda_build, version_matrix

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("nm") is None, reason="cc and nm are not on PATH"
)


def library(folder: Path, name: str, source: str) -> Path:
    (folder / "lib").mkdir(exist_ok=True)
    out = folder / "lib" / f"lib{name}.so"
    (folder / "source.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", folder / "source.c", "-o", out], check=True)
    return out


@needs_compiler
def test_a_stub_has_the_names_of_the_stable_abi_alone(tmp_path: Path) -> None:
    path = library(
        tmp_path, "torch_cpu", "int torch_a() {} int aoti_torch_b() {} int _ZN2at3catEv() {}"
    )
    cuda_build.stub(path, "torch_cpu")
    names = cuda_build.symbols(path, "--defined-only")
    assert {"torch_a", "aoti_torch_b"} <= names and "_ZN2at3catEv" not in names


@needs_compiler
@pytest.mark.parametrize(
    ("calls", "fault"),
    [
        ("torch_a", None),
        ("torch_new", "torch does not have: torch_new"),
        ("cudaMalloc", "left undefined: cudaMalloc"),
        ("_ZN2at3catEv", "left undefined: _ZN2at3catEv"),
        ("_ZNK3c104dataEv", "left undefined: _ZNK3c104dataEv"),
    ],
)
def test_what_an_extension_may_call(tmp_path: Path, calls: str, fault: str | None) -> None:
    for name in cuda_build.LIBRARIES:
        library(tmp_path, name, "int torch_a() {}")
    extension = library(tmp_path, "extension", f"int f() {{ return {calls}(); }}")
    if fault is None:
        return cuda_build.check_symbols(extension, tmp_path)
    with pytest.raises(SystemExit, match=fault):
        cuda_build.check_symbols(extension, tmp_path)
    return None


def test_the_table_says_what_was_not_tried() -> None:
    rows = [
        version_matrix.Row("2.11.0", "2.11.0+cu130", "13.0", "3.6.0", "3.12.1", "yes", "CPU", "x"),
        version_matrix.Row("2.15.0", built="failed"),
    ]
    rows[0].details["without_cuda"] = "nvcc was not found"
    text = version_matrix.table(rows)
    first, second = text.splitlines()[2:4]
    assert first.startswith("| 2.11.0+cu130 | 3.6.0 | 3.12.1 | CPU | x | not tried |")
    assert second == "| 2.15.0 | not tried | not tried | failed |" + " not tried |" * 4
    assert "torch 2.11.0+cu130, no CUDA kernels: nvcc was not found." in text
