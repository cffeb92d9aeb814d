"""Whether the base product adds each token's own adapter itself, and which way a cost model takes.

fused     the sums s, then one product whose epilogue adds s·Bᵀ: y is written once
composed  the base product, then the passes of `plan.py` over its y

A dense base is torch's own product unless fused is asked for: a token without adapter then has the
bits that nn.Linear gives. The product of a 4-bit base is this package's own, the same tile either
way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

from lora_kernels.dispatch.settings import Setting
from lora_kernels.ops.common.configs import (
    ConfigExplanation,
    Device,
    Estimate,
    GemmConfig,
    best_gemm,
    gemm_tiles,
    is_valid,
)
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.strategies import choose
from lora_kernels.ops.gather.triton.plan import GatherProblem, expand_estimate

BASES = ("fused", "composed")

_forced: Setting[str | None] = Setting("base", None)


@contextmanager
def use_base(name: str | None) -> Iterator[None]:
    """Add many adapters to a base one way, in this thread, until the block ends.

    Raises:
        ValueError: `name` is none of `BASES`.
    """
    if name is not None and name not in BASES:
        raise ValueError(f"base: got {name!r}, expected one of {', '.join(BASES)}")
    with _forced.use(name):
        yield


def explain_base(
    problem: GatherProblem, base: Problem, device: Device, *, asked: bool = False
) -> ConfigExplanation:
    """What the cost model says of each way to add the adapters to a base.

    Args:
        base: the product alone, of rank 0.
        asked: fused is asked for, also over a product that is the vendor's.
    """
    alone = choose("lora_linear_fwd", replace(base, dropout=False), device)
    after = expand_estimate(problem, device)
    composed = Estimate(
        "composed",
        alone.config,
        alone.launches + after.launches,
        alone.dram_bytes + after.dram_bytes,
        alone.asked_bytes + after.asked_bytes,
        alone.flops + after.flops,
        alone.waves,
        alone.seconds + after.seconds,
    )
    found = (_fused(problem, base, alone, device, asked), composed)
    return ConfigExplanation(f"gather_lora over a base {problem}", device, found)


def fused_config(problem: GatherProblem, base: Problem, device: Device) -> GemmConfig | None:
    """The product's tile where it adds the adapters itself, else None."""
    return _choose(problem, base, device, _forced.get())


@lru_cache(maxsize=4096)
def _choose(
    problem: GatherProblem, base: Problem, device: Device, forced: str | None
) -> GemmConfig | None:
    if forced == "composed":
        return None
    explanation = explain_base(problem, base, device, asked=forced == "fused")
    fused, chosen = explanation.estimates[0], explanation.chosen
    return fused.config if chosen is fused or forced == "fused" else None


def _fused(
    problem: GatherProblem, base: Problem, alone: Estimate, device: Device, asked: bool
) -> Estimate:
    if problem.mixture:
        return _refused("a token may have several entries")
    config, seconds = alone.config, alone.seconds
    if not asked and not base.quantised:
        return _refused("a dense base is torch's own product, for its bits")
    if not asked and config is None:
        return _refused("the vendor's product of a decoded base is cheaper")
    if config is None or not base.quantised:
        sizes = base.m, base.n, base.k, device, base.size
        best = best_gemm(*sizes, masked_y=True, quantised=base.quantised, tma=base.tma)
        if best is None:
            return _refused("no tile fits the device")
        config, seconds = best[0], best[1]
    # What is added has sums of its own beside the product's.
    if not is_valid(config, device, base.size, 0, 1, base.tma, False, base.quantised):
        return _refused(f"a tile of {config} has no registers for a second sum")
    # Each row's own rows of B, and s anew for every eight columns: two parts in fp32.
    pages = (base.size + 1) * problem.entries * problem.n * problem.ranks
    outputs = gemm_tiles(config, base.m, base.n) * config.block_m * config.block_n
    flops = 2.0 * outputs * problem.ranks
    added = max(pages / device.l2_bandwidth, flops / device.fp32_flops)
    groups = min(problem.slots, problem.entries)
    return Estimate(
        "fused",
        config,
        alone.launches,
        alone.dram_bytes + base.size * groups * problem.n * problem.ranks,
        alone.asked_bytes + pages,
        alone.flops,
        alone.waves,
        seconds + added,
    )


def _refused(reason: str) -> Estimate:
    return Estimate("fused", None, 0, 0, 0, 0, 0, float("inf"), reason)
