"""Calls of the multi-adapter op to count: what serving engines decode and prefill."""

from __future__ import annotations

from lora_kernels.ops.gather.triton.fused_epilogue import BASES
from tools.gpu_proofs.baselines import Sizes
from tools.gpu_proofs.workload import Workload, nbytes
from tools.op_inputs import gather
from tools.op_inputs.gather import Gather
from tools.op_inputs.source import BF16, Shape, Source

# name: tokens, ranks of the slots; slot t·S/T is token t's
CALLS = {
    "gather decode": (32, (16,) * 32),
    "gather decode r=64": (64, (64,) * 64),
    "gather decode r=8-64": (32, (8, 16, 32, 64) * 8),
    "gather prefill": (512, (16,) * 4),
}


def gather_workloads(shape: Shape, source: Source) -> list[Workload]:
    """Every call, N and K being those of the shape; the first also over a 4-bit W, as a layer."""
    _, n, k, _ = shape
    calls = {
        name: Gather(tokens, k, (n,), ranks, slots="in-order", spare=0)
        for name, (tokens, ranks) in CALLS.items()
    }
    found = [_adapters(name, c, source) for name, c in calls.items()]
    first, c = found[0], calls["gather decode"]
    x, base, *rest = gather.forward(Gather(**{**vars(c), "base": "nf4-nested"}), source)
    floor = first.floor - c.t * n * BF16.itemsize + nbytes(*base)
    flops = first.flops + 2 * c.t * n * k
    over = ("gather_lora_fwd", [x, base, *rest], first.sizes, 0.0, floor, flops, c.t * n, BASES)
    return [*found, Workload("gather decode over nf4", *over)]


def _adapters(name: str, c: Gather, source: Source) -> Workload:
    """y += the adapters' part."""
    (n,) = c.n
    out, x, pages, (slots,), _ = args = gather.add(c, source)
    floor = sum(c.ranks) * (c.k + n) * BF16.itemsize + nbytes(x, out, out)
    flops = 2 * int(pages[3][slots.long()].sum()) * (c.k + n)
    z = Sizes(c.t, n, c.k, max(c.ranks))
    return Workload(name, "gather_lora_add", args, z, 0.0, floor, flops, c.t * n)
