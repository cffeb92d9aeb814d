"""Calls of the multi-adapter op to count: what serving engines decode and prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.rivals import Sizes
from bench.gpu.subject import BF16, Fill, Shape, Subject, nbytes
from lora_kernels.ops.gather import PAGE, pages_of

# name: tokens, ranks of the slots; slot t·S/T is token t's
CALLS = {
    "gather decode": (32, (16,) * 32),
    "gather decode r=64": (64, (64,) * 64),
    "gather decode r=8-64": (32, (8, 16, 32, 64) * 8),
    "gather prefill": (512, (16,) * 4),
}


def gather(shape: Shape, fill: Fill) -> list[Subject]:
    """Every call, N and K being those of the shape."""
    return [_subject(name, *sizes, shape[1], shape[2], fill) for name, sizes in CALLS.items()]


def _subject(name: str, tokens: int, ranks: tuple[int, ...], n: int, k: int, fill: Fill) -> Subject:
    """y += the adapters' part; pages of a slot are scattered over the pool."""
    counts = [pages_of(r) for r in ranks]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int()
    table = torch.full((len(ranks), max(counts)), -1, dtype=torch.int32)
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    a, b = (fill(sum(counts), PAGE, c, dtype=BF16) for c in (k, n))
    p = [a, b, table, torch.tensor(ranks, dtype=torch.int32), torch.ones(len(ranks))]
    slots = torch.arange(tokens, dtype=torch.int32) * len(ranks) // tokens
    slots = slots.int()
    out, x = fill(tokens, n, dtype=BF16), fill(tokens, k, dtype=BF16)
    used = sum(ranks) * (k + n) * BF16.itemsize
    floor = used + nbytes(x, out, out)
    each: Tensor = p[3][slots.long()]
    flops = 2 * int(each.sum()) * (k + n)
    z = Sizes(tokens, n, k, max(ranks))
    args = [out, x, p, [slots], False]
    return Subject(name, "gather_lora_add", args, z, 0.0, floor, flops, tokens * n)
