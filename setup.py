"""Builds lora_kernels._C by running CMakeLists.txt; all else is in pyproject.toml.

LORA_KERNELS_NO_NATIVE=1       install without the extension
LORA_KERNELS_REQUIRE_NATIVE=1  fail where it cannot be built (otherwise the package is installed
                               without it and says so when it is imported)
LORA_KERNELS_CUDA_ARCHS        GPUs to compile for, as CMake's CUDA_ARCHITECTURES. Fewer build
                               faster: `90a-real` is H100 and H200 alone, `native` (cmake 3.24) what
                               this machine has
LORA_KERNELS_CMAKE_ARGS        more arguments for CMake, such as -DLORA_KERNELS_CUDA=OFF
JOBS                           compilers at a time; all cores by default

Where the CUDA kernels do not build, the extension is built without them and says so too; with
-DLORA_KERNELS_CUDA=ON that is an error.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
# Read by lora_kernels/dispatch/installed.py.
FAILED = "_build_failed.txt"
RETRY = "-DLORA_KERNELS_CUDA=OFF"


class BuildError(RuntimeError):
    """What failed, and the end of what the tools said of it."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


class CMakeBuild(build_ext):
    failed = ""

    def run(self) -> None:
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        note = package / "lora_kernels" / FAILED
        if self.failed:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(self.failed, encoding="utf-8")
        else:
            note.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        # A wheel or an editable install made now must not carry an extension built earlier.
        target.unlink(missing_ok=True)
        try:
            built = self.build_native()
        except (OSError, BuildError) as error:
            if not ext.optional:
                raise
            Path(ROOT, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            self.note("native backend", error)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)

    def build_native(self) -> Path:
        """Builds with the CUDA kernels, or without where they are what fails."""
        arguments = shlex.split(os.environ.get("LORA_KERNELS_CMAKE_ARGS", ""))
        try:
            return run_cmake(arguments)
        except BuildError as error:
            if any("LORA_KERNELS_CUDA=" in a for a in arguments) or not with_nvcc():
                raise
            print(f"\nbuilding again, without CUDA kernels: {error}\n", file=sys.stderr)
            reason = str(error).replace(";", ",")
            built = run_cmake([*arguments, RETRY, f"-DLORA_KERNELS_WITHOUT_CUDA={reason}"])
            self.note("CUDA kernels", error)
            return built

    def note(self, what: str, error: Exception) -> None:
        self.failed = f"lora_kernels was installed without its {what}: {error}\n"
        print(f"\nwarning: {self.failed}", file=sys.stderr)
        self.failed += getattr(error, "output", "")

    def copy_extensions_to_source(self) -> None:
        # Removed, not overwritten: a running process keeps the file that it has mapped.
        for ext in self.extensions:
            Path(ROOT, self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def environment() -> dict[str, str]:
    """With the tools beside this Python, found though its environment is not activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = os.environ.get("JOBS") or str(cores or 1)
    return {"CMAKE_BUILD_PARALLEL_LEVEL": jobs, **os.environ, "PATH": path}


def run_cmake(arguments: list[str]) -> Path:
    """Configures and builds the target _C; returns the built file."""
    path = environment()["PATH"]
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            raise BuildError(f"{tool} was not found on PATH (pip install {tool})")
    # CMake keeps what it found in its cache: the checkout may have moved since, or another compiler
    # may be asked for.
    found = [ROOT, *map(os.environ.get, ("CC", "CXX", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME"))]
    key = repr([*map(str, found), shutil.which("nvcc", path=path)])
    stamp = BUILD / "made-with.txt"
    if BUILD.exists() and not (stamp.exists() and stamp.read_text() == key):
        shutil.rmtree(BUILD)
    BUILD.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key)
    archs = os.environ.get("LORA_KERNELS_CUDA_ARCHS", "")
    called(
        "cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-Wno-dev",
        # One build folder serves every Python and torch, which share the kernels' objects; what the
        # last one was told, and its ninja, which may be gone, are forgotten.
        "-UPython_*", "-U_Python_*", "-ULORA_KERNELS_*", "-UCMAKE_MAKE_PROGRAM",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLORA_KERNELS_TORCH=ON",
        "-DLORA_KERNELS_CHECKS=OFF",
        f"-DLORA_KERNELS_CUDA_ARCHS={archs}",
        *arguments,
    )  # fmt: skip
    for old in BUILD.glob("_C.*"):
        old.unlink()
    called("cmake", "--build", str(BUILD), "--target", "_C")
    built = [p for p in BUILD.glob("_C.*") if p.suffix in (".so", ".dylib")]
    if len(built) != 1:
        raise OSError(f"expected one built extension in {BUILD}, found {len(built)}")
    return built[0]


def called(*command: str) -> None:
    """Runs a command, its output shown as it comes.

    Raises:
        BuildError: it fails; with the first error in what it printed.
    """
    last: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
    if process.returncode != 0:
        raise BuildError(first_error(list(last)) or f"{command[0]} failed", "".join(last))


def first_error(lines: list[str]) -> str:
    """The first error among lines of compilers or of CMake, whose words follow indented."""
    for i, line in enumerate(lines):
        if not re.search(r"\b(error|fatal)\b", line, re.IGNORECASE):
            continue
        words = [line]
        if line.startswith("CMake Error"):
            words += itertools.takewhile(str.strip, lines[i + 1 :])
        return " ".join(" ".join(words).split())[:500]
    return ""


def with_nvcc() -> bool:
    """Whether the build that was tried had nvcc."""
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists():
        return False
    return re.search(r"^CMAKE_CUDA_COMPILER:\w+=/", cache.read_text(), re.MULTILINE) is not None


native = Extension("lora_kernels._C", sources=[], optional=not flag("LORA_KERNELS_REQUIRE_NATIVE"))
if flag("LORA_KERNELS_NO_NATIVE"):
    Path(ROOT, "lora_kernels", FAILED).unlink(missing_ok=True)
setup(
    ext_modules=[] if flag("LORA_KERNELS_NO_NATIVE") else [native],
    cmdclass={"build_ext": CMakeBuild},
)
