"""Arguments that several kernels of many adapters share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Mask:
    """The dropout of each slot, for one projection."""

    def __init__(self, dropout: Sequence[Tensor], stream: int) -> None:
        self.seeds, self.thresholds, self.rows = dropout
        self.stream = stream


def mask_args(mask: Mask | None) -> dict[str, Any]:
    if mask is None:
        return {"p_seeds": None, "p_thresholds": None, "p_rows": None, "stream": 0}
    return {
        "p_seeds": mask.seeds,
        "p_thresholds": mask.thresholds,
        "p_rows": mask.rows,
        "stream": mask.stream,
    }


def layout(s: Tensor) -> dict[str, Any]:
    """Of s [E, ..] or its parts [spans, E, ..], whose last stride is 1."""
    return {"size": s.stride(0) if s.dim() == 3 else 0, "stride_s": s.stride(-2)}
