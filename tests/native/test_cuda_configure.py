"""CMake's choice to link the CUDA kernels, against folders that only look like builds of torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

for tool in ("nvcc", "cmake", "ninja"):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not on PATH", allow_module_level=True)
NVCC = re.findall(
    r"release (\d+)\.", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
)[0]


def fake_torch(folder: Path, cuda: str | None) -> Path:
    """What CMake looks at of a torch."""
    (folder / "lib").mkdir(parents=True)
    (folder / "include").mkdir()
    text = f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\n"
    (folder / "version.py").write_text(text)
    for name in ("cpu", "cuda")[: 1 if cuda is None else 2]:
        (folder / "lib" / f"libtorch_{name}.so").touch()
    return folder


class Configure:
    """One build folder, whose compilers are looked at once; every call sets all that matters."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.build = folder, folder / "build"

    def __call__(self, cuda: str | None, **options: str) -> tuple[str, str]:
        """What CMake says, and the facts that build_info() would give; "" where it fails."""
        torch = self.folder / f"torch-{cuda}"
        if not torch.exists():
            fake_torch(torch, cuda)
        options = {"CUDA": "AUTO", "CUDA_ARCHS": "", "CUDA_NEWER_THAN_TORCH": "OFF", **options}
        options |= {"TORCH": "ON", "CHECKS": "OFF", "TIERS": "scalar", "TORCH_ROOT": str(torch)}
        command = ["cmake", "-S", str(ROOT), "-B", str(self.build), "-G", "Ninja", "-Wno-dev"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-DLORA_KERNELS_{name}={value}" for name, value in options.items()]
        done = subprocess.run(command, capture_output=True, text=True)
        facts = self.build / "generated" / "lora_kernels" / "build_facts.h"
        text = " ".join((done.stdout + done.stderr).split())
        return text, facts.read_text() if done.returncode == 0 else ""


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    return Configure(tmp_path_factory.mktemp("configure"))


@pytest.mark.parametrize("archs", ["", "80-real;90a-real"])
def test_linked(configure: Configure, archs: str) -> None:
    """The list stays whole: at its semicolons a compile definition would be split."""
    _, facts = configure(f"{NVCC}.0", CUDA_ARCHS=archs)
    assert 'kWithoutCuda = R"lk()lk"' in facts
    expected = re.escape(archs) or r"80-real;86-real;89-real;90a-real;\w[\w-]*"
    assert re.search(rf'kCudaArchs = R"lk\({expected}\)lk"', facts)


def test_nvcc_newer_than_torch(configure: Configure) -> None:
    """Its kernels could need a newer driver than torch does."""
    older = f"{int(NVCC) - 1}.8"
    said, facts = configure(older)
    assert f"torch 2.11.0 of CUDA {older}" in said
    assert 'kCudaArchs = R"lk()lk"' in facts
    assert re.search(rf'kWithoutCuda = R"lk\(nvcc is of CUDA {NVCC}.*need a newer driver', facts)
    said, facts = configure(older, CUDA="ON")
    assert "LORA_KERNELS_CUDA=ON, but nvcc is of CUDA" in said and not facts
    _, facts = configure(older, CUDA_NEWER_THAN_TORCH="ON")
    assert 'kWithoutCuda = R"lk()lk"' in facts


def test_torch_for_the_cpu(configure: Configure) -> None:
    _, facts = configure(None)
    assert "torch 2.11.0 is not built for CUDA" in facts
