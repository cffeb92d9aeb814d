"""Writing files whole or not at all, and by one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def one_process(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Yield whether this process writes.

    If `fully_shard` has split the tensors, only the first process does. The others wait for it at
    the end of the block, and all raise its error.
    """
    if not any(hasattr(t, "full_tensor") for t in tensors):
        yield True
        return
    import torch.distributed as dist

    error: list[Exception | None] = [None]
    first = dist.get_rank() == 0
    try:
        yield first
    except Exception as raised:
        error = [raised]
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]
