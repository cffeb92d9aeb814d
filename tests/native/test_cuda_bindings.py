"""The CUDA bindings, which are built only beside a CUDA build of torch: that they compile, and that
what they call is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from tests.native import cuda_linear
from tests.native.cuda_launcher import ROOT, built

BINDINGS = sorted((ROOT / "csrc" / "bindings").glob("*_cuda.cpp"))
# torch's own CUDA library has these.
OF_TORCH_CUDA = {"aoti_torch_get_current_cuda_stream"}


def toolkit() -> Path:
    nvcc = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-"], capture_output=True, text=True)
    (top,) = re.findall(r"^#\$ TOP=(.*)$", nvcc.stderr, flags=re.M)
    return Path(top)


def compiled(source: Path, folder: Path) -> Path:
    out = folder / f"{source.stem}.o"
    tiers = folder / "lora_kernels" / "tiers.h"  # as csrc/cmake/tiers.cmake writes it
    tiers.parent.mkdir(exist_ok=True)
    tiers.write_text("#define LK_FOR_EACH_TIER(X, ...) X(scalar, __VA_ARGS__)\n")
    includes = [*cpp_extension.include_paths(), toolkit() / "include"]
    command = ["c++", "-std=c++17", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
    command += [
        f"-I{ROOT / 'csrc' / 'include'}",
        f"-I{folder}",
        *(f"-isystem{i}" for i in includes),
    ]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def symbols(which: str, path: Path, *flags: str) -> set[str]:
    done = subprocess.run(
        ["nm", which, *flags, str(path)], capture_output=True, text=True, check=True
    )
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bindings")
    common = ROOT / "csrc" / "bindings" / "common.cpp"
    return {source.stem: compiled(source, folder) for source in (common, *BINDINGS)}


def test_every_binding_is_covered() -> None:
    families = {path.stem.removesuffix("_cuda") for path in BINDINGS}
    assert families == {"nf4", "nf4_linear"}


@pytest.mark.parametrize("stem", [path.stem for path in BINDINGS])
def test_launchers_are_there(stem: str, objects: dict[str, Path]) -> None:
    """Their signatures too: a C++ symbol holds them."""
    wanted = {s for s in symbols("--undefined-only", objects[stem]) if "12lora_kernels" in s}
    launchers = set(built("nf4", "nf4_encode", *cuda_linear.SOURCES).symbols)
    defined = launchers | symbols("--defined-only", objects["common"])
    assert wanted and wanted & launchers
    assert not wanted - defined


@pytest.mark.parametrize("stem", [path.stem for path in BINDINGS])
def test_torch_has_what_is_called(stem: str, objects: dict[str, Path]) -> None:
    wanted = {s for s in symbols("--undefined-only", objects[stem]) if re.match("aoti_|torch_", s)}
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert wanted >= OF_TORCH_CUDA
    assert not wanted - OF_TORCH_CUDA - symbols("--defined-only", library, "-D")
