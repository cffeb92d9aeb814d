"""The strategies for the LoRA products, what each of them costs, and the choice among them.

Forward  addmm        vendor GEMM; s = keep(x)·Aᵀ; y += scale·s·Bᵀ
         epilogue     s first; one GEMM whose sums start from the branch
         single_pass  one GEMM that makes s from the tiles of x it reads anyway
Backward addmm        vendor GEMM; ds; dx += keep(ds·A); dA and dB
         epilogue     one read of dy for ds and dB; one GEMM that starts from the branch; dA
         single_pass  one GEMM that makes ds from the tiles of dy; dA and dB in one launch
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from lora_kernels.dispatch.settings import Setting
from lora_kernels.ops.common import tuned
from lora_kernels.ops.common.configs import (
    GEMM_CONFIGS,
    ConfigExplanation,
    Device,
    Estimate,
    GemmConfig,
    best_gemm,
    gemm_asked_bytes,
    gemm_tiles,
    mask_seconds,
)
from lora_kernels.ops.common.problem import OPS, STRATEGIES, Problem
from lora_kernels.ops.common.problem import block_rank as block_rank
from lora_kernels.ops.common.rank_wide import shrink_config, split_size, wgrad_config
from lora_kernels.ops.common.tuned import Table

# Rank columns that fit beside a full tile of sums; more do not pay either.
MAX_SINGLE_PASS_RANK = 64
# Rank columns of one pass over dy that makes both ds and dB.
MAX_ONE_READ_RANK = 64

# Bytes of a 4-bit W that are decoded at a time for the vendor's product. They fit the L2 of an A100
# and of an H100, so that the product reads them from there.
WORKSPACE_BYTES = 32 << 20
# From this number of rows on, a tile is a product of a whole warpgroup.
WARPGROUP_ROWS = 64

_forced: Setting[str | None] = Setting("strategy", None)


@contextmanager
def use_strategy(name: str | None) -> Iterator[None]:
    """Run the Triton LoRA kernels by one strategy, in this thread, until the block ends.

    Raises:
        ValueError: `name` is none of `STRATEGIES`.
    """
    if name is not None and name not in STRATEGIES:
        raise ValueError(f"strategy: got {name!r}, expected one of {', '.join(STRATEGIES)}")
    with _forced.use(name):
        yield


@dataclass(frozen=True)
class Work:
    """Launches beside the large product."""

    launches: int = 0
    moved: float = 0.0  # bytes
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.launches + other.launches,
            self.moved + other.moved,
            self.seconds + other.seconds,
        )


NOTHING = Work()


def explain_config(op: str, problem: Problem, device: Device) -> ConfigExplanation:
    """What the cost model says of each strategy, and which one is taken: the one that a table of
    measurements on this GPU prefers (`tuned.py`), or the cheapest.

    Args:
        op: "lora_linear_fwd" or "lora_linear_bwd".
        device: one of `configs.DEVICES`, or `configs.device_of(...)`.

    Raises:
        ValueError: `op` is neither of the two.
    """
    return _explain(op, problem, device, tuned.table_for(device))


def _explain(op: str, problem: Problem, device: Device, table: Table | None) -> ConfigExplanation:
    if op not in OPS:
        raise ValueError(f"op: got {op!r}, expected {' or '.join(OPS)}")
    estimate = _forward if op == "lora_linear_fwd" else _backward
    p = replace(problem, m=max(problem.m, 1), n=max(problem.n, 1), k=max(problem.k, 1))
    found = {strategy: estimate(strategy, p, device) for strategy in STRATEGIES}
    entry = None if table is None else table.find(op, p, device)
    if entry is not None:
        # The model of this tile alone knows every rule that it must keep here.
        only = device if entry.config is None else replace(device, tiles=(entry.config,))
        measured = estimate(entry.strategy, p, only)
        if measured.refusal is None:
            found[entry.strategy] = replace(measured, measured=entry.seconds)
    return ConfigExplanation(f"{op} {problem}", device, tuple(found.values()))


@lru_cache(maxsize=4096)
def _choose(
    op: str,
    problem: Problem,
    device: Device,
    forced: str | None,
    without: str | None,
    table: Table | None,
) -> Estimate:
    explanation = _explain(op, problem, device, table)
    usable = {
        e.strategy: e for e in explanation.estimates if e.refusal is None and e.strategy != without
    }
    if not usable:
        reasons = "; ".join(
            f"{e.strategy}: {e.refusal or 'the caller does not have it'}"
            for e in explanation.estimates
        )
        raise ValueError(f"{explanation.title} on {device.name}: no strategy can run it: {reasons}")
    if forced in usable:
        return usable[forced]
    return min(usable.values(), key=lambda e: e.rank)


def choose(op: str, problem: Problem, device: Device, without: str | None = None) -> Estimate:
    """The estimate to follow: the forced strategy's, where it can be, else what a table of
    measurements prefers, else the cheapest.

    Args:
        without: a strategy that the caller does not have.

    Raises:
        ValueError: every strategy refuses; it names each one's reason.
    """
    return _choose(op, problem, device, _forced.get(), without, tuned.table_for(device))


def one_read_parts(m: int, n: int, device: Device, block_n: int = 256) -> tuple[int, int]:
    """Parts of ds (blocks of n, none of n = 0) and of dB (parts of m >= 1) when one pass over dy
    makes both."""
    parts_n = ceil(n / block_n)
    parts_m = max(1, min(ceil(m / 64), ceil(device.multiprocessors / max(1, parts_n))))
    return parts_n, ceil(m / split_size(m, parts_m, 64))


def _forward(strategy: str, p: Problem, device: Device) -> Estimate:
    """y [m, n] = x [m, k]·Wᵀ with its branch."""
    if strategy == "single_pass":
        return _single_pass(p, p.n, p.k, device, masked_x=p.dropout)
    if p.r == 0:
        return (_addmm if strategy == "addmm" else _epilogue)(p, p.n, p.k, device, NOTHING)
    config = shrink_config(p.m, p.k, device, p.block_r, p.size)
    moved = p.size * (p.m * p.k + p.r * p.k + p.m * p.r) + _parts(config.split_k, p.m * p.r)
    mask = mask_seconds(p.m * p.k, device) if p.dropout else 0.0
    shrink = _work(2 if config.split_k > 1 else 1, moved, device, mask)
    if strategy == "addmm":
        return _addmm(p, p.n, p.k, device, shrink)
    return _epilogue(p, p.n, p.k, device, shrink)


def _backward(strategy: str, p: Problem, device: Device) -> Estimate:
    """dx [m, k] = dy [m, n]·W with its branch, then dA and dB."""
    if p.r == 0 and strategy != "single_pass":
        return (_addmm if strategy == "addmm" else _epilogue)(p, p.k, p.n, device, NOTHING)
    alone = strategy != "single_pass"
    columns = p.k if alone else p.k + p.n
    config = wgrad_config(p.m, columns, device, p.block_r, p.size)
    moved: float = p.size * (p.m * columns + p.r * columns + p.m * p.r * (1 if alone else 2))
    moved += _parts(config.split_k, p.r * columns)
    mask = mask_seconds(p.m * p.k, device) if p.dropout else 0.0
    outer = _work(2 if config.split_k > 1 else 1, moved, device, mask)
    if strategy == "single_pass":
        return _single_pass(p, p.k, p.n, device, masked_y=p.dropout, beside=outer)
    if p.r <= MAX_ONE_READ_RANK:
        parts_n, parts_m = one_read_parts(p.m, p.n, device)
        read: float = p.size * (p.m * p.n + p.m * p.r + p.n * p.r)
        read += _parts(parts_n, p.m * p.r, always=True) + _parts(parts_m, p.n * p.r, always=True)
    else:
        read = p.size * 2 * (p.m * p.n + p.m * p.r + p.n * p.r)
    beside = outer + _work(2, read, device)
    if strategy == "addmm":
        return _addmm(p, p.k, p.n, device, beside)
    return _epilogue(p, p.k, p.n, device, beside, masked_y=p.dropout)


def _work(launches: int, moved: float, device: Device, at_least: float = 0.0) -> Work:
    seconds = max(moved / device.bandwidth, at_least) + launches * device.launch_seconds
    return Work(launches, moved, seconds)


def _parts(split_k: int, elements: int, always: bool = False) -> float:
    """Bytes of fp32 parts, written and read; none where there is one part."""
    return 0.0 if split_k == 1 and not always else 8.0 * split_k * elements


def _single_pass(
    p: Problem,
    n: int,
    k: int,
    device: Device,
    *,
    masked_x: bool = False,
    masked_y: bool = False,
    beside: Work = NOTHING,
) -> Estimate:
    """A GEMM [m, n] over k that makes its own s or ds."""
    br, size = p.block_r, p.size
    if p.r == 0:
        return _refused("single_pass", "has no branch")
    if p.r > MAX_SINGLE_PASS_RANK:
        return _refused("single_pass", f"takes ranks up to {MAX_SINGLE_PASS_RANK}")
    tiles_allowed = device.tiles or GEMM_CONFIGS
    if not device.rank_sums:
        tiles_allowed = tuple(t for t in tiles_allowed if t.block_m < WARPGROUP_ROWS)
    found = best_gemm(
        p.m,
        n,
        k,
        device,
        size,
        configs=tiles_allowed,
        block_r=br,
        branch=br,
        masked_x=masked_x,
        masked_y=masked_y,
        quantised=p.quantised,
        tma=p.tma,
    )
    if found is None:
        return _refused("single_pass", "no tile fits the device")
    config, seconds, waves = found
    tiles = gemm_tiles(config, p.m, n)
    dram = size * (p.m * k + p.m * n + p.m * p.r + p.r * (n + k)) + p.weight_bytes
    asked = gemm_asked_bytes(config, p.m, n, k, size, p.weight_size)
    asked += size * (tiles * br * (k + config.block_n) + p.m * p.r)
    flops = 2.0 * tiles * config.block_m * (config.block_n * (k + br) + br * k)
    return _estimate("single_pass", config, beside, dram, asked, flops, waves, seconds)


def _epilogue(
    p: Problem, n: int, k: int, device: Device, beside: Work, *, masked_y: bool = False
) -> Estimate:
    """A GEMM [m, n] over k whose sums start from t·u, after launches that made t."""
    size, padded = p.size, ceil(p.r / p.block_r) * p.block_r
    found = best_gemm(
        p.m,
        n,
        k,
        device,
        size,
        branch=padded,
        masked_y=masked_y,
        quantised=p.quantised,
        tma=p.tma,
    )
    if found is None:
        return _refused("epilogue", "no tile fits the device")
    config, seconds, waves = found
    tiles = gemm_tiles(config, p.m, n)
    dram = size * (p.m * k + p.m * n + p.m * p.r + n * p.r) + p.weight_bytes
    asked = gemm_asked_bytes(config, p.m, n, k, size, p.weight_size)
    asked += size * padded * tiles * (config.block_m + config.block_n)
    flops = 2.0 * tiles * config.block_m * config.block_n * (k + padded)
    return _estimate("epilogue", config, beside, dram, asked, flops, waves, seconds)


def _addmm(p: Problem, n: int, k: int, device: Device, beside: Work) -> Estimate:
    """The vendor's GEMM [m, n] over k, taken to be as good as ours, and one more pass over y."""
    size = p.size
    found = best_gemm(p.m, n, k, device, size, tma=p.tma, exactly=True)
    if found is None:
        return _refused("addmm", "no tile fits the device")
    slabs = ceil(p.n * p.k * size / WORKSPACE_BYTES) if p.quantised else 0
    if slabs > 1 and p.k % 32:
        return _refused("addmm", "decodes slabs of rows that are multiples of 32")
    product = size * (p.m * k + p.m * n) + p.weight_bytes
    seconds = found[1]
    if p.quantised:  # written to L2 and read from there
        seconds += max(
            p.weight_bytes / device.bandwidth, 2 * size * p.n * p.k / device.l2_bandwidth
        )
        seconds += (2 * slabs - 1) * device.launch_seconds
    branch = size * (2 * p.m * n + p.m * p.r + n * p.r) if p.r else 0
    if p.r:
        seconds += branch / device.bandwidth + device.launch_seconds
        beside += Work(1)
    launches = max(0, 2 * slabs - 1)
    flops = 2.0 * p.m * n * (k + (p.block_r if p.r else 0))
    moved = product + branch
    return _estimate("addmm", None, beside + Work(launches), moved, moved, flops, 1, seconds)


def _estimate(
    strategy: str,
    config: GemmConfig | None,
    beside: Work,
    dram: float,
    asked: float,
    flops: float,
    waves: int,
    seconds: float,
) -> Estimate:
    return Estimate(
        strategy,
        config,
        beside.launches + 1,
        dram + beside.moved,
        asked + beside.moved,
        flops,
        waves,
        seconds + beside.seconds,
    )


def _refused(strategy: str, reason: str) -> Estimate:
    return Estimate(strategy, None, 0, 0, 0, 0, 0, float("inf"), reason)
