"""Builds lora_kernels._C by running CMakeLists.txt; all else is in pyproject.toml.

LORA_KERNELS_NO_NATIVE=1       install without the extension
LORA_KERNELS_REQUIRE_NATIVE=1  fail where it cannot be built (otherwise: a warning, and a package
                               whose ops run on the other backends)
LORA_KERNELS_CMAKE_ARGS        more arguments for CMake, such as -DLORA_KERNELS_CUDA=OFF
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"


def flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            built = run_cmake()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            # A wheel or an editable install made now must not carry an extension built earlier.
            Path(ROOT, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            print(
                f"\nwarning: lora_kernels is installed without its native backend: {error}\n"
                "Every op works on the other backends. Set LORA_KERNELS_REQUIRE_NATIVE=1 to make "
                "this an error, LORA_KERNELS_NO_NATIVE=1 to skip the attempt.\n",
                file=sys.stderr,
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)

    def copy_extensions_to_source(self) -> None:
        # Removed, not overwritten: a running process keeps the file that it has mapped.
        for ext in self.extensions:
            Path(ROOT, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def run_cmake() -> Path:
    """Configure and build the target _C; returns the built file."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} was not found on PATH")
    cache = BUILD / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(BUILD)  # the checkout was moved or copied
    subprocess.run(
        [
            "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-Wno-dev",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLORA_KERNELS_TORCH=ON",
            "-DLORA_KERNELS_CHECKS=OFF",
            f"-DPython_EXECUTABLE={sys.executable}",
            *shlex.split(os.environ.get("LORA_KERNELS_CMAKE_ARGS", "")),
        ],
        check=True,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", str(BUILD), "--target", "_C"], check=True)
    built = [p for p in BUILD.glob("_C.*") if p.suffix in (".so", ".dylib")]
    if len(built) != 1:
        raise RuntimeError(f"expected one built extension in {BUILD}, found {len(built)}")
    return built[0]


native = Extension("lora_kernels._C", sources=[], optional=not flag("LORA_KERNELS_REQUIRE_NATIVE"))
setup(
    ext_modules=[] if flag("LORA_KERNELS_NO_NATIVE") else [native],
    cmdclass={"build_ext": CMakeBuild},
)
