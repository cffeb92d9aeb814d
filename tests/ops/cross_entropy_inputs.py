"""Inputs of the cross-entropy ops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.ops.case import Case, dtype_name, size_name
from tools.op_inputs.source import DTYPES, Source, strided

IGNORED = -100
# rows, vocabulary: around the vectors' widths and the length of a partial sum.
LOGITS = ((1, 1), (3, 7), (5, 16), (4, 33), (2, 1024), (3, 1500), (0, 9))


def _labels(r: Source, rows: int, vocabulary: int) -> Tensor:
    """Every third label is the ignored one."""
    labels = torch.randint(vocabulary, (rows,), generator=r.generator)
    labels[1::3] = IGNORED
    return labels


def cross_entropy() -> Iterator[Case]:
    def make(
        r: Source, size: tuple[int, int], dtype: torch.dtype, kind: str, grad: bool
    ) -> tuple[Any, ...]:
        logits = r.normal(*size, dtype=dtype, std=3.0)
        if kind == "far":  # exp would overflow, and underflow
            logits = logits * 100 + 500
        if kind == "equal":
            logits = torch.zeros_like(logits)
        labels = _labels(r, *size)
        if kind == "all-ignored":
            labels.fill_(IGNORED)
        return strided(logits, kind) if kind in ("transposed", "padded-rows") else logits, *(
            (labels, IGNORED, grad)
        )

    for dtype, size in itertools.product(DTYPES, LOGITS):
        yield Case(
            "cross_entropy",
            f"{dtype_name(dtype)}-{size_name(*size)}",
            lambda r, s=size, d=dtype: make(r, s, d, "", True),
            core=dtype is torch.float32 and size in ((3, 7), (0, 9)),
        )
    for dtype, kind in itertools.product(
        DTYPES, ("far", "equal", "all-ignored", "transposed", "padded-rows")
    ):
        yield Case(
            "cross_entropy",
            f"{dtype_name(dtype)}-{kind}",
            lambda r, d=dtype, k=kind: make(r, (6, 40), d, k, True),
            core=dtype is torch.bfloat16,
        )
    for dtype in DTYPES:
        yield Case(
            "cross_entropy",
            f"{dtype_name(dtype)}-loss-only",
            lambda r, d=dtype: make(r, (6, 40), d, "", False),
            core=True,
        )


def linear_cross_entropy() -> Iterator[Case]:
    def make(
        r: Source, size: tuple[int, int, int], dtype: torch.dtype, needs: tuple[bool, bool]
    ) -> tuple[Any, ...]:
        m, k, v = size
        x, w = r.normal(m, k, dtype=dtype), r.normal(v, k, dtype=dtype, std=2 * max(k, 1) ** -0.5)
        return x, w, _labels(r, m, v), IGNORED, list(needs)

    sizes = ((1, 8, 5), (33, 20, 70), (64, 48, 301), (0, 4, 6), (5, 0, 6))
    needs = ((True, True), (True, False), (False, True), (False, False))
    for dtype, size, need in itertools.product(DTYPES, sizes, needs):
        label = "".join("01"[n] for n in need)
        yield Case(
            "linear_cross_entropy",
            f"{dtype_name(dtype)}-{size_name(*size)}-needs{label}",
            lambda r, s=size, d=dtype, n=need: make(r, s, d, n),
            core=dtype is not torch.float16 and size[0] == 33,
        )
