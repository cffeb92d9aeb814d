"""Which instruction sets `make test-cpp` builds with the sanitizers: the best that runs here,
scalar, which no build goes without, and one of the others that the commit draws. The rest would
cost a minute each; `make test-full` takes all that run."""

from __future__ import annotations

import sys
import zlib

from lora_kernels.dispatch import native
from tests.sampling import seed


def tiers(usable: tuple[str, ...], sample: float, drawn: str) -> list[str]:
    """Of the usable tiers, best first and scalar last."""
    best, others, scalar = usable[:1], usable[1:-1], usable[-1:]
    if sample >= 1 or len(others) < 2:
        return list(usable)
    return [*best, others[zlib.crc32(drawn.encode()) % len(others)], *scalar]


if __name__ == "__main__":
    print(";".join(tiers(native.isas(), float(sys.argv[1]), seed())))
