"""Loads the compiled extension `lora_kernels._C`, once, when first asked for.

Importing it registers the CPU (and, where torch has CUDA, CUDA) implementations of
`lora_kernels_native::<op>`. A missing or broken extension is no error here: `why_unavailable` says
what is wrong and the other backends run. Loading also reads the file that `LORA_KERNELS_TUNING`
names (tuning.py).
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lora_kernels.dispatch import installed
from lora_kernels.dispatch import tuning as tuning_file

_MODULE = "lora_kernels._C"
# The floor of the stable ABI functions that the extension calls.
_OLDEST_TORCH = (2, 10)
_lock = threading.Lock()
_loaded: list[ModuleType] = []  # of one at most
_observers = 0
_REBUILD = f"build it with `{installed.BUILD}` (needs a C++ compiler)"


class _Loaded(NamedTuple):
    module: ModuleType | None
    reason: str | None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


@functools.cache
def _load() -> _Loaded:
    if installed.switched_off():
        return _Loaded(None, f"{installed.SWITCH} is set")
    if _torch_version() < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return _Loaded(None, f"torch {torch.__version__} is older than {oldest}")
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            return _Loaded(None, f"{_MODULE} failed to import: {error}")
        return _Loaded(None, installed.why_missing())
    except (ImportError, OSError, RuntimeError) as error:
        # An undefined symbol: built against a newer torch than this one.
        return _Loaded(
            None,
            f"{_MODULE} does not load with torch {torch.__version__}: {error}; {_REBUILD}",
        )
    tuning_file.apply_file(module)
    with _lock:
        module.set_observers(_observers)
        _loaded.append(module)
    return _Loaded(module, None)


def observe(change: int) -> None:
    """A block that forces a backend, or asks which one runs, begins (1) or ends (-1). Ops that a
    compiled graph calls without Python then leave the choice to Python."""
    global _observers
    with _lock:
        _observers += change
        for module in _loaded:
            module.set_observers(_observers)


def _module() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the native backend is not available: {reason}")
    return module


def fill_new_tensors(on: bool) -> None:
    """Have torch fill what the CPU kernels write to, as its deterministic mode does its own new
    tensors: for tests, process-wide, and to no effect without the extension."""
    module = _load().module
    if module is not None:
        module.fill_new_tensors(on)


def available() -> bool:
    """Whether the extension is loaded; loads it on the first call."""
    return _load().module is not None


def why_unavailable() -> str | None:
    """One line that says why the extension is not there, or None when it is."""
    return _load().reason


def why_without_cuda() -> str | None:
    """Why the extension has no CUDA kernels; None where it has them, or is not there itself."""
    module = _load().module
    return (module.build_info().get("without_cuda") or None) if module is not None else None


def build_info() -> dict[str, Any]:
    """compiler, flags, torch (version built with), isas (compiled in); cuda (nvcc's version) and
    cuda_archs, or without_cuda (why there are no CUDA kernels), each "" otherwise.

    Raises RuntimeError without the extension, as the functions below do.
    """
    return dict(_module().build_info())


def isas() -> tuple[str, ...]:
    """Instruction-set tiers that run on this machine, best first; empty without the extension."""
    module = _load().module
    return tuple(module.isas()) if module is not None else ()


def current_isa() -> str:
    """The tier in use."""
    return str(_module().current_isa())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of another tier inside the block: for tests, and process-wide.

    Raises ValueError for a tier that was not compiled or that this machine lacks.
    """
    module = _module()
    previous = module.current_isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(previous)


def tuning() -> dict[str, int]:
    """The block sizes of the CPU kernels in use, by name; they change no bit of a result."""
    return dict(_module().tuning())


def default_tuning() -> dict[str, int]:
    """The block sizes for this machine's L2 cache, whatever is in use."""
    return dict(_module().default_tuning(l2_bytes()))


def l2_bytes() -> int:
    """The L2 cache of a core; 0 where the system does not tell."""
    return int(_module().l2_bytes())


def tuned_for() -> dict[str, Any]:
    """What a file of block sizes made here begins with, and must begin with to be read here."""
    return tuning_file.head(_module())


@contextmanager
def use_tuning(values: Mapping[str, int]) -> Iterator[None]:
    """Run the CPU kernels with these block sizes inside the block, process-wide; those not named
    stay as they are.

    Raises ValueError for a name or a value that does not fit.
    """
    module = _module()
    previous = module.tuning()
    module.set_tuning(dict(values))
    try:
        yield
    finally:
        module.set_tuning(previous)
