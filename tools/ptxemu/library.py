"""The emulator's C++ library: built on first use, and loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent / "src"
_FLAGS = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-math-errno"),
    *("-shared", "-fPIC", "-pthread"),
)


class PtxError(RuntimeError):
    """The emulated kernel failed: bad address, deadlock, trap, unsupported instruction, race ...

    Attributes:
        result: what was counted and reported until then, where the kernel ran.
    """

    result: Any = None


class Options(ctypes.Structure):
    """`Opts` of src/machine.h."""

    _fields_ = (
        ("max_instr", ctypes.c_int64),
        *((n, ctypes.c_uint32) for n in ("slice", "seed", "nthreads", "coresident")),
        *((n, ctypes.c_int32) for n in ("race", "uninit", "poison_shared", "check_global")),
        *((n, ctypes.c_int32) for n in ("max_reports", "sm_count")),
    )


class Buffer(ctypes.Structure):
    """`CBuf` of src/ptxemu.cpp: a buffer's device address, its memory and what of it is valid."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        *((n, ctypes.c_uint64) for n in ("size", "lo", "hi")),
        ("ro", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


def _build() -> Path:
    """The library, built where the checkout can be written to, else among temporary files."""
    flags = list(_FLAGS)
    try:
        found = re.search(r"^flags\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    if found and {"avx2", "fma", "f16c", "bmi2"} <= set(found[1].split()):
        flags.append("-march=x86-64-v3")
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    name = f"ptxemu-{digest.hexdigest()[:16]}.so"
    folders = (SOURCES.parent / "build", Path(tempfile.gettempdir(), f"ptxemu-{os.getuid()}"))
    for folder in folders:
        library = folder / name
        if library.exists():
            return library
        try:
            folder.mkdir(exist_ok=True)
            temporary = library.with_suffix(f".so.{os.getpid()}")
            compiler = os.environ.get("CXX", "g++")
            command = [compiler, *flags, str(SOURCES / "ptxemu.cpp"), "-o", str(temporary)]
            subprocess.run(command, check=True)
            os.replace(temporary, library)
            return library
        except OSError:
            continue
    raise RuntimeError("cannot build ptxemu")


@cache
def lib() -> ctypes.CDLL:
    """The loaded library."""
    loaded = ctypes.CDLL(str(_build()))
    loaded.pe_error.restype = loaded.pe_out.restype = ctypes.c_char_p
    loaded.pe_load.restype = ctypes.c_void_p
    loaded.pe_load.argtypes = [ctypes.c_char_p]
    loaded.pe_free.argtypes = [ctypes.c_void_p]
    loaded.pe_info.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    buffers: list[Any] = [ctypes.POINTER(Buffer), ctypes.c_int]
    name, address, count = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint32
    kernel: list[Any] = [address, name, address, address, name, count, count]
    loaded.pe_launch.argtypes = [*kernel, ctypes.POINTER(Options), *buffers, *buffers]
    return loaded
