"""How a call with many adapters is shared out among programs: two schedules, and a cost model.

per_token  a program for each entry: nothing is sorted, an adapter's pages are read for every entry
grouped    entries of one slot in chunks, made on the device: pages are read once for each chunk

Both add in the same order, 16 ranks at a time and part by part of K: the bits of a token do not
depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import torch

from lora_kernels.dispatch.settings import Setting
from lora_kernels.ops.common.checks import names
from lora_kernels.ops.common.configs import (
    ConfigExplanation,
    Device,
    Estimate,
    GemmConfig,
    mask_seconds,
)
from lora_kernels.ops.gather.pages import PAGE

SCHEDULES = ("per_token", "grouped")
# Parts of K at most: parts of s are a small share of what is read beside them.
MOST_SPLITS = 8
SPLIT_SIZE = 256
_CHUNK = 64  # entries of a chunk
_TILE_PARTS = 2
# Beside the two passes: making the chunks, and torch's sort and search of a mixture's tokens.
BUCKET_LAUNCHES = 1
SORT_LAUNCHES = 5

_forced: Setting[str | None] = Setting("schedule", None)


@contextmanager
def use_schedule(name: str | None) -> Iterator[None]:
    """Use one schedule for calls with many adapters, in this thread, until the block ends.

    Raises:
        ValueError: `name` is none of `SCHEDULES`.
    """
    if name is not None and name not in SCHEDULES:
        raise ValueError(f"schedule: got {name!r}, expected one of {', '.join(SCHEDULES)}")
    with _forced.use(name):
        yield


def capacity(entries: int, slots: int, block: int) -> int:
    """The most chunks of `block` entries that the slots in use, and those of none, can make."""
    return (entries + min(slots + 1, entries) * (block - 1)) // block


@dataclass(frozen=True)
class GatherProblem:
    """A call as the cost model sees it.

    Attributes:
        entries, slots, ranks: E, S and the ranks that a slot has room for.
        n, k: output and input features of a projection.
        dtype: of x.
        mixture: whether a token may have several entries.
        dropout: whether the mask is regenerated.
    """

    entries: int
    slots: int
    ranks: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    mixture: bool = False
    dropout: bool = False

    def __str__(self) -> str:
        text = f"E={self.entries} S={self.slots} r<={self.ranks} N={self.n} K={self.k}"
        return f"{text} {names([self.dtype])}{' mixture' * self.mixture}{' dropout' * self.dropout}"


@dataclass(frozen=True)
class Plan:
    """Tiles of the two launches of a projection.

    Attributes:
        grouped: the schedule; see above.
        split: whether a program takes one of the `split_k` parts of K, each `per_split` long.
        block_m: entries of a chunk; block_k: of a step of K.
        block_n: columns of a program of one token; chunk_n: of a chunk's, `blocks` times.
        page_programs: programs that share the pages of a slot.
    """

    grouped: bool
    split: bool
    per_split: int
    split_k: int
    block_k: int
    block_m: int
    block_n: int
    chunk_n: int
    blocks: int
    page_programs: int
    shrink_warps: int
    expand_warps: int
    chunk_warps: int
    stages: int


def explain_gather(problem: GatherProblem, device: Device) -> ConfigExplanation:
    """What the cost model says of each schedule, and which is taken."""
    found = tuple(_estimate(schedule, problem, device) for schedule in SCHEDULES)
    return ConfigExplanation(f"gather_lora {problem}", device, found)


def plan(problem: GatherProblem, device: Device) -> Plan:
    """The tiles of the forced schedule, or of the cheaper one."""
    return _plan(problem, device, _forced.get())


@lru_cache(maxsize=4096)
def _plan(problem: GatherProblem, device: Device, forced: str | None) -> Plan:
    chosen = explain_gather(problem, device).chosen
    assert chosen is not None
    return _tiles(forced or chosen.strategy, problem, device)


def _tiles(schedule: str, p: GatherProblem, device: Device) -> Plan:
    per_split = SPLIT_SIZE
    while ceil(p.k / per_split) > MOST_SPLITS:
        per_split *= 2
    split_k = max(1, ceil(p.k / per_split))
    wide = p.dtype == torch.float32
    found = Plan(
        grouped=schedule == "grouped",
        split=schedule == "per_token" and split_k > 1,
        per_split=per_split,
        split_k=split_k,
        block_k=64 if wide else SPLIT_SIZE,
        block_m=_CHUNK,
        block_n=64 if wide else 256,
        chunk_n=64 if wide else 128,
        blocks=2,
        page_programs=1,
        shrink_warps=2,
        expand_warps=2,
        chunk_warps=2,
        stages=2,
    )
    columns = max(1, p.ranks // PAGE)
    if found.grouped:
        programs = capacity(p.entries, p.slots, found.block_m)
        found = replace(
            found,
            # A step of fp32 is a sum of its own: its length is the same either schedule.
            block_k=64,
            shrink_warps=4,
            # Two ask for the fewest bytes; a mask, or the sums of more pages, take registers.
            chunk_warps=4 if p.dropout or columns > 1 else 2,
            stages=2 if wide else 3,
        )
    else:
        programs = p.entries * split_k
    # Few programs share a slot's pages, so that more of them are under schedule.
    share = max(1, device.multiprocessors // max(1, programs))
    return replace(found, page_programs=min(columns, share))


def _estimate(schedule: str, p: GatherProblem, device: Device) -> Estimate:
    tiles = _tiles(schedule, p, device)
    size = p.dtype.itemsize
    groups = min(p.slots, p.entries)
    pages = size * p.ranks * (p.n + p.k)
    tokens = size * p.entries * (p.k + 2 * p.n)
    if schedule == "per_token":
        programs, columns, repeat = p.entries, tiles.block_n, 16
        reads = p.entries
    else:
        programs, columns, repeat = capacity(p.entries, p.slots, tiles.block_m), tiles.chunk_n, 1
        reads = programs
    sums = 4 * p.entries * p.ranks * (tiles.split_k if tiles.split else 1)
    if p.mixture:
        reads = max(reads, p.entries)
    dram = groups * pages + tokens + 2 * sums
    asked = reads * pages + tokens + sums * (1 + ceil(p.n / columns))
    if schedule == "grouped":
        asked += 8 * p.entries * (p.slots + 1)  # every slot's program looks at every entry
        asked += size * p.entries * p.k * (ceil(p.ranks / PAGE) - 1)
    flops = 2.0 * p.entries * p.ranks * (p.n + p.k) * repeat
    peak = device.matrix_flops if size == 2 else device.fp32_flops
    launches = 2 + BUCKET_LAUNCHES * (schedule == "grouped") + SORT_LAUNCHES * p.mixture
    seconds = max(dram / device.bandwidth, asked / device.l2_bandwidth, flops / peak)
    if p.dropout:
        seconds += mask_seconds(repeat * p.entries * p.k, device)
    config = GemmConfig(
        tiles.block_m if tiles.grouped else 1,
        columns,
        tiles.block_k,
        tiles.chunk_warps if tiles.grouped else tiles.expand_warps,
        tiles.stages,
    )
    return Estimate(
        schedule,
        config,
        launches,
        dram,
        asked,
        flops,
        ceil(programs * ceil(p.n / columns) / device.multiprocessors),
        seconds + launches * device.launch_seconds,
    )


def expand_estimate(p: GatherProblem, device: Device) -> Estimate:
    """What the pass takes that adds the adapters' part to y, by the cheaper schedule."""
    size = p.dtype.itemsize
    tokens = 2 * size * p.entries * p.n
    page = size * p.ranks * p.n
    reads = min(p.entries, capacity(p.entries, p.slots, _CHUNK))
    dram = min(p.slots, p.entries) * page + tokens
    asked = reads * page + tokens
    seconds = max(dram / device.bandwidth, asked / device.l2_bandwidth) + device.launch_seconds
    return Estimate("expand", None, 1, dram, asked, 0.0, 1, seconds)


def few_parts(found: Plan, k: int) -> Plan:
    """The plan with parts of s that every tile of a product can read."""
    if not found.split or found.split_k <= _TILE_PARTS:
        return found
    per_split = ceil(k / (_TILE_PARTS * SPLIT_SIZE)) * SPLIT_SIZE
    return replace(found, per_split=per_split, split_k=ceil(k / per_split), stages=3)
