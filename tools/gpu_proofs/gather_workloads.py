"""Calls of the multi-adapter op to count: what serving engines decode and prefill."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.ops.gather import PAGE, pages_of
from lora_kernels.ops.gather.triton.base_plan import BASES
from tools.gpu_proofs.baselines import Sizes
from tools.gpu_proofs.workload import BF16, Fill, Shape, Workload, nbytes, quantised

# name: tokens, ranks of the slots; slot t·S/T is token t's
CALLS = {
    "gather decode": (32, (16,) * 32),
    "gather decode r=64": (64, (64,) * 64),
    "gather decode r=8-64": (32, (8, 16, 32, 64) * 8),
    "gather prefill": (512, (16,) * 4),
}


def gather(shape: Shape, fill: Fill) -> list[Workload]:
    """Every call, N and K being those of the shape."""
    n, k = shape[1:3]
    found = [_workload(name, *sizes, n, k, fill) for name, sizes in CALLS.items()]
    return [*found, _over_nf4(found[0], n, k, fill)]


def _workload(
    name: str, tokens: int, ranks: tuple[int, ...], n: int, k: int, fill: Fill
) -> Workload:
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
    return Workload(name, "gather_lora_add", args, z, 0.0, floor, flops, tokens * n)


def _over_nf4(decode: Workload, n: int, k: int, fill: Fill) -> Workload:
    """The whole layer: y = x·Wᵀ + the adapters' part over a 4-bit W."""
    out, x, pages, entries, _ = decode.args
    q = quantised(n, k, True, fill)
    with use_backend("reference"):
        w = q.dequantize(BF16)
    args, dense = (
        [x, *base, None, pages, entries, []] for base in ((q.base, q.meta), ([w], [n, k]))
    )
    return replace(
        decode,
        name="gather decode over nf4",
        op="gather_lora_fwd",
        args=args,
        floor=decode.floor - nbytes(out) + nbytes(*q.base),
        flops=decode.flops + 2 * x.shape[0] * n * k,
        strategies=BASES,
        dense=("gather_lora_fwd", dense),
    )
