"""The memory that adapters take, computed, and the memory that is free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import psutil
import torch

from lora_kernels.cli.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20
PAGE = 16  # ranks


@dataclass(frozen=True)
class Arithmetic:
    """The memory of adapters of one rank on every layer.

    Attributes:
        shapes: (in_features, out_features) of each layer.
    """

    shapes: tuple[tuple[int, int], ...]
    adapters: int
    rank: int
    itemsize: int

    @property
    def pages_each(self) -> int:
        return math.ceil(self.rank / PAGE)

    @property
    def width(self) -> int:
        """Elements of one rank row of A and B, summed over all layers."""
        return sum(k + n for k, n in self.shapes)

    @property
    def values(self) -> int:
        """Bytes of A and B."""
        return self.adapters * self.rank * self.width * self.itemsize

    @property
    def pages(self) -> int:
        """Bytes of the pages that hold them."""
        return self.adapters * self.pages_each * PAGE * self.width * self.itemsize

    @property
    def tables(self) -> int:
        """Bytes of page numbers (4 each), rank and scale (4 each) of every slot at every layer."""
        return self.adapters * len(self.shapes) * (4 * self.pages_each + 8)

    def check_room(self, device: torch.device) -> None:
        """Raise UsageError if the pages do not fit in free memory."""
        free, need = free_bytes(device), self.pages + self.tables
        if need > free:
            raise UsageError(
                f"--adapters: {self.adapters} of rank {self.rank} take {size(need)} of pages, and "
                f"{size(free)} of memory are free; ask for fewer"
            )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def size(count: int) -> str:
    """Bytes as text."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.2f} MiB"


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())
