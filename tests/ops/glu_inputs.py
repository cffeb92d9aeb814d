"""Inputs of the gated linear units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.glu.schema import ACTIVATIONS
from tests.ops.case import DTYPES, Case, Source, dtype_name, size_name, strided

# Around the vectors' widths and the length of a thread's piece.
SIZES = ((1, 1), (7, 3), (33, 8), (5, 31), (1, 1024), (3, 1100), (0, 9), (4, 0))
STRIDES = ("transposed", "padded-rows", "every-other-column", "expanded")
# Standard deviations of g. Where it is wide, most of an activation is 0 or a straight line, and it
# takes many values to have some in the bend.
WIDTHS = {"": 1.5, "-wide": 20.0}
MANY = 1000


def _tensors(
    r: Source, size: tuple[int, int], dtype: torch.dtype, count: int, strides: str, width: float
) -> list[Tensor]:
    """g first: its values spread as far as `width`."""
    tensors = [r.normal(*size, dtype=dtype, std=width if i == 0 else 1.0) for i in range(count)]
    return [strided(t, strides) for t in tensors] if strides else tensors


def _calls() -> Iterator[tuple[str, tuple[Any, ...], int, bool]]:
    """label, arguments of `_tensors` but the source and the count, activation, core"""
    for dtype, size, (a, name), (wide, width) in itertools.product(
        DTYPES, SIZES, enumerate(ACTIVATIONS), WIDTHS.items()
    ):
        if wide and size[0] * size[1] < MANY:
            continue
        core = size in ((5, 31), (0, 9)) and not wide and dtype is torch.float32
        label = f"{dtype_name(dtype)}-{size_name(*size)}-{name}{wide}"
        yield label, (size, dtype, "", width), a, core
    for dtype, kind in itertools.product(DTYPES, STRIDES):
        yield f"{dtype_name(dtype)}-{kind}", ((6, 19), dtype, kind, 1.0), 0, dtype is DTYPES[2]


def glu_fwd() -> Iterator[Case]:
    def make(r: Source, call: tuple[Any, ...], activation: int) -> tuple[Any, ...]:
        size, dtype, kind, width = call
        return *_tensors(r, size, dtype, 2, kind, width), activation

    for label, call, a, core in _calls():
        yield Case("glu_fwd", label, lambda r, c=call, a=a: make(r, c, a), core=core)


def glu_bwd() -> Iterator[Case]:
    def make(r: Source, call: tuple[Any, ...], activation: int, need_h: bool) -> tuple[Any, ...]:
        size, dtype, kind, width = call
        g, u, dh = _tensors(r, size, dtype, 3, kind, width)
        return dh, g, u, activation, need_h

    for (label, call, a, core), need_h in itertools.product(_calls(), (True, False)):
        yield Case(
            "glu_bwd",
            label + "-h" * need_h,
            lambda r, c=call, a=a, h=need_h: make(r, c, a, h),
            core=core,
        )
