"""Compile and link lora_kernels._C against a CUDA build of torch, and load it, without a GPU.

    python tools/cuda_build.py [--torch 2.11.0] [--build build/native] [--archs 90a-real]

Needs nvcc and a C++ compiler. Of the CUDA build its wheel alone is downloaded, once: the headers
are kept under build/, and of its two libraries the names of the stable C ABI, as empty libraries to
link against. That proves that the sources compile against that torch's headers, that every function
of torch that they call is one of its stable ABI, and that nothing of the CUDA runtime is left to be
found. The extension is then loaded into the torch of this environment, whichever it is: its CUDA
ops must be registered, and an op on CPU tensors must give the reference's numbers. No CUDA kernel
runs; tools/version_matrix.py loads it into real CUDA builds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda-torch"
TORCH = "2.11.0"  # the oldest that PyPI has for CUDA 13
LIBRARIES = ("torch_cpu", "torch_cuda")
STABLE_ABI = re.compile(r"(aoti_)?torch_\w+")
CUDA_OPS = {
    "nf4_quantize",
    "nf4_quantize_scales",
    "nf4_dequantize",
    "nf4_linear_fwd",
    "lora_linear_fwd",
}

LOAD = """
import ctypes, importlib.util, sys
ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)  # in place of the torch_cuda that this torch lacks
import torch
spec = importlib.util.spec_from_file_location("lora_kernels._C", sys.argv[1])
sys.modules["lora_kernels._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from lora_kernels import NF4Weight, functional, use_backend
from lora_kernels.dispatch import native, ops
from lora_kernels.testing import assert_within_budget
assert native.available(), native.why_unavailable()
assert native._module() is module
has = torch._C._dispatch_has_kernel_for_dispatch_key
found = {op for op in ops() if has(f"lora_kernels_native::{op}", "CUDA")}
assert found == set(sys.argv[3].split(",")), f"CUDA ops: {sorted(found)}"
torch.manual_seed(0)
w, x = NF4Weight.quantize(torch.randn(96, 128)), torch.randn(4, 128)
with use_backend("native"):
    y = functional.nf4_linear(x, w)
with use_backend("reference"):
    plain = functional.nf4_linear(x, w)
assert_within_budget(y, x.double() @ w.dequantize().double().T, plain)
info = native.build_info()
print(f"loaded into torch {torch.__version__}: built for torch {info['torch']} with nvcc "
      f"{info['cuda']} for {info['cuda_archs']}, {len(found)} CUDA ops")
"""


def run(*command: str | Path, **kwargs: object) -> str:
    """The output of a command; where it fails, that is printed and the script ends."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout


def symbols(library: Path, which: str) -> set[str]:
    """Names in the dynamic symbol table."""
    lines = run("nm", "-D", which, library).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def stub(library: Path, name: str) -> None:
    """A library that has the stable ABI's names of another, and nothing behind them."""
    names = sorted(filter(STABLE_ABI.fullmatch, symbols(library, "--defined-only")))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "stub.c")
        source.write_text("".join(f"void {n}(void) {{}}\n" for n in names))
        out = library.with_suffix(".stub")
        run(os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", f"-Wl,-soname,lib{name}.so",
            source, "-o", out)  # fmt: skip
    out.replace(library)
    print(f"lib{name}.so: {len(names)} functions of the stable ABI")


def cuda_torch(version: str) -> Path:
    """The folder `torch` of a CUDA build: headers, version.py and libraries to link against."""
    kept = CACHE / f"{version}-{sys.implementation.cache_tag}"
    if kept.exists():
        return kept / "torch"
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        print(f"downloading torch {version} (once)", flush=True)
        run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download",
            "--no-deps", "--only-binary=:all:", "-d", folder, f"torch=={version}")  # fmt: skip
        (wheel,) = folder.glob("torch-*.whl")
        libraries = [f"torch/lib/lib{name}.so" for name in LIBRARIES]
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if libraries[-1] not in names:
                sys.exit(f"{wheel.name} is not built for CUDA: choose another with --torch")
            wanted = [n for n in names if n.startswith("torch/include/") or n in libraries]
            archive.extractall(folder, [*wanted, "torch/version.py"])
        wheel.unlink()
        for name, path in zip(LIBRARIES, libraries, strict=True):
            stub(folder / path, name)
        folder.rename(kept)
        folder.mkdir()  # for TemporaryDirectory to remove
    return kept / "torch"


def build(torch: Path, folder: Path, archs: str, jobs: str) -> Path:
    """The extension, built against a torch that need not be installed."""
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-Wno-dev",
        "-UPython_*", "-U_Python_*", "-ULORA_KERNELS_*", "-UCMAKE_MAKE_PROGRAM",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release", "-DLORA_KERNELS_TORCH=ON", "-DLORA_KERNELS_CUDA=ON",
        f"-DLORA_KERNELS_CUDA_ARCHS={archs}", "-DLORA_KERNELS_CHECKS=OFF",
        f"-DLORA_KERNELS_TORCH_ROOT={torch}")  # fmt: skip
    for old in folder.glob("_C.*"):
        old.unlink()
    run("cmake", "--build", folder, "--target", "_C", "-j", jobs)
    (extension,) = folder.glob("_C.*.so")
    return extension


def check_symbols(extension: Path, torch: Path) -> None:
    """Nothing is left to be found but the stable ABI of torch, Python and the C++ runtime."""
    offered: set[str] = set()
    for name in LIBRARIES:
        offered |= symbols(torch / "lib" / f"lib{name}.so", "--defined-only")
    wanted = symbols(extension, "--undefined-only")
    called = {n for n in wanted if STABLE_ABI.fullmatch(n)}
    foreign = {n for n in wanted if re.match(r"_ZN?K?\d*(2at|3c10|5torch)|cuda|cu[A-Z]|__cuda", n)}
    if called - offered:
        sys.exit(f"torch does not have: {', '.join(sorted(called - offered))}")
    if foreign:
        sys.exit(f"left undefined: {', '.join(sorted(foreign))}")
    print(f"{extension.name}: calls {len(called)} functions of torch's stable ABI, all there")


def load(extension: Path, torch: Path) -> None:
    """Loads it into this environment's torch."""
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    here.pop("LORA_KERNELS_NO_NATIVE", None)
    library = torch / "lib" / "libtorch_cuda.so"
    print(run(sys.executable, "-c", LOAD, extension, library, ",".join(CUDA_OPS), env=here), end="")


def main() -> None:
    """As the module says."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=TORCH, help="release of torch (%(default)s)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native")
    parser.add_argument("--archs", default="90a-real", help="GPUs (%(default)s)")
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1), help="compilers at a time")
    args = parser.parse_args()
    # The ninja that built the package here: another one would build all anew.
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    os.environ["PATH"] = os.pathsep.join(path)
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        print("skipped: nvcc is not on PATH, and CUDACXX names none")
        return
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        print("skipped: no C++ compiler (set CXX to name one)")
        return
    torch = cuda_torch(args.torch)
    extension = build(torch, args.build.resolve(), args.archs, args.jobs)
    check_symbols(extension, torch)
    load(extension, torch)


if __name__ == "__main__":
    main()
