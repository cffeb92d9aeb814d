"""What a case of an op stands for, so that a sample of a grid leaves none of it out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.dispatch import ops
from tests.ops.case import Case

LARGE = 128  # a side that is more than any tile's


def grid(case: Case, args: Any, variant: object = "") -> pytest.MarkDecorator:
    """The mark of a case run by a variant: each op, by each variant, in each dtype and with each
    edge among its sizes, is in every sample."""
    features = [f"{case.op} {variant} {f}" for f in (_dtype(args), *sorted(_edges(args)))]
    return pytest.mark.grid(*features, family=family(case.op))


def family(op: str) -> str:
    """The folder under lora_kernels/ops that an op comes from."""
    return ops()[op].implementations["reference"].fn.__module__.split(".")[2]


def _dtype(args: Any) -> str:
    return next((str(t.dtype) for t in _tensors(args) if t.is_floating_point()), "no float")


def _edges(args: Any) -> set[str]:
    """Sizes that kernels go wrong at: none, one, odd, many."""
    sizes = {n for t in _tensors(args) if t.dtype != torch.uint8 and t.ndim > 1 for n in t.shape}
    edges = {"0": 0 in sizes, "1": 1 in sizes, "large": any(n > LARGE for n in sizes)}
    edges["odd"] = any(n > 1 and n % 2 for n in sizes)
    return {name for name, there in edges.items() if there}


def _tensors(args: Any) -> Iterator[Tensor]:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)
