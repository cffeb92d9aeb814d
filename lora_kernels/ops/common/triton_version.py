"""Which releases of Triton the kernels run on, and which shortcomings of a release they work
around."""

from __future__ import annotations

import importlib.util
from functools import cache

OLDEST = (3, 6)  # torch 2.10 brings it
# The first to let Hopper's products see what cp.async copied: see `tiles.fence_copies`.
FENCES_COPIES = (3, 7)
# The interpreter before it makes numbers of arrays that have a dimension; numpy 2.4 forbids that.
_TAKES_ANY_NUMPY = (3, 7)
_NUMPY_FORBIDS = (2, 4)


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

    if release(triton.__version__) >= OLDEST:
        return None
    return (
        f"takes triton {OLDEST[0]}.{OLDEST[1]} or later, not {triton.__version__}: older ones "
        "compile some kernels wrongly"
    )


@cache
def refuse_interpreter() -> str | None:
    """Why Triton's interpreter does not run here, or None."""
    import numpy
    import triton

    old = release(triton.__version__) < _TAKES_ANY_NUMPY
    if not old or release(numpy.__version__) < _NUMPY_FORBIDS:
        return None
    return (
        f"the interpreter of triton {triton.__version__} takes numpy below 2.4, "
        f"not {numpy.__version__}"
    )
