"""Memory of one call: the peak above what stood before, what is kept, whether it is fresh."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> tuple[int, int] | None:
    """(now, peak) resident set size of this process; None where the kernel does not say (Linux)."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    values = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.M))
    if len(values) != 2:
        return None
    return int(values["VmRSS"]) * 1024, int(values["VmHWM"]) * 1024


def release_freed() -> None:
    """Give freed heap back to the system: what is allocated next comes in pages not touched yet.

    Without it the allocator may hand a call the pages of the result before, or may not: by size
    and history. Only glibc can be told to; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Give freed heap back to the system and restart the peak from the present size."""
    gc.collect()
    release_freed()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def of_process(step: Callable[[], object]) -> dict[str, int | None]:
    """The peak of the whole process in a step, and what it held before; None where unknown."""
    if not reset_peak() or (before := resident_bytes()) is None:
        return {"peak_bytes": None, "resident_bytes": None}
    step()
    after = resident_bytes()
    assert after is not None
    return {"peak_bytes": after[1], "resident_bytes": before[0]}


def peak_extra(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which one call's peak exceeds what was resident before it.

    On CUDA the caching allocator's own count; on a CPU the resident set, so memory that libraries
    take behind torch's back counts too, in pages of 4 KiB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not reset_peak():
        return None
    start = resident_bytes()
    call()
    end = resident_bytes()
    if start is None or end is None:
        return None
    return max(0, end[1] - start[0])


def saved_for_backward(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from a forward, each storage once, weights and adapters left out.

    Args:
        forward: runs the forward with gradients on.
        parameters: tensors whose storages do not count.
    """
    known = {_address(t) for p in parameters for t in _parts(p)}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be used again while counting

    def pack(t: Tensor) -> Tensor:
        for part in _parts(t) if isinstance(t, torch.Tensor) else ():
            if _address(part) not in known:
                # Not the part in use: a view of a large buffer keeps all of it alive.
                saved[_address(part)] = part.untyped_storage().nbytes()
                alive.append(part)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(saved.values())


def _parts(t: Tensor) -> Iterator[Tensor]:
    """The tensors with storage that a wrapper, such as torchao's NF4 tensor, is made of."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        yield t
        return
    for name in flatten()[0]:
        yield from _parts(getattr(t, name))


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
