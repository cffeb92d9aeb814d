"""Which releases of Triton the kernels run on, and what a release lacks that they make up for."""

from __future__ import annotations

import importlib.util
from functools import cache

OLDEST = (3, 6)  # torch 2.10 brings it
# cp.async's writes are fenced before Hopper's products read them from this one on.
FENCES_COPIES = (3, 7)
# The interpreter before it turns arrays of one element into numbers, which numpy 2.4 forbids.
_INTERPRETS_WITH_ANY_NUMPY = (3, 7)
_FORBIDS = (2, 4)


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@cache
def refuse() -> str | None:
    """Why no kernel runs on the Triton that is installed, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if release(triton.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"takes triton {oldest} or later, not {triton.__version__}, which miscompiles some"
    return None


@cache
def refuse_interpreter() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    import numpy
    import triton

    if (
        release(triton.__version__) < _INTERPRETS_WITH_ANY_NUMPY
        and release(numpy.__version__) >= _FORBIDS
    ):
        return (
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, "
            f"not {numpy.__version__}"
        )
    return None
