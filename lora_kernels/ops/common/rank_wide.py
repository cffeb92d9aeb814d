"""Configurations of the passes over x or dy with a rank-wide partner, and which one is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from lora_kernels.ops.common.configs import Device, next_power_of_2


@dataclass(frozen=True)
class RankWideConfig:
    """Tiles of a pass over x or dy with a rank-wide partner.

    `block` is the tile's size along the dimension of the result (rows of s, columns of dy), `step`
    its size along the dimension that is summed. `split_k` cuts that sum into parts, which are added
    in order afterwards.
    """

    block: int
    step: int
    warps: int
    stages: int
    split_k: int = 1

    def __str__(self) -> str:
        tile = f"{self.block}x{self.step} warps {self.warps} stages {self.stages}"
        return f"{tile} split_k {self.split_k}"

    def shared_bytes(self, size: int, block_r: int) -> int:
        depth = max(1, self.stages - 1)
        return depth * (self.block + block_r) * self.step * size

    def of_several(self, block_r: int) -> RankWideConfig:
        """The same pass with up to three partners of x, whose tiles are loaded together with those
        of x."""
        warps = 8 if block_r > 32 and self.block == 64 else self.warps
        stages = min(self.stages, 3)
        return replace(self, step=min(self.step, 64), warps=warps, stages=stages, split_k=1)


def shrink_config(m: int, k: int, device: Device, block_r: int, size: int = 2) -> RankWideConfig:
    """Tiles of s[m, r] = x[m, k]·q: rows stay, k is summed.

    Rows are split until every multiprocessor has a program, then k is.
    """
    if size == 4:
        return RankWideConfig(16, 32, 4, 2)
    block = 64 if m > 64 else max(16, next_power_of_2(m))
    # Below 64 rows Hopper falls back to older instructions; at 16 a program asks for q as for x.
    smallest = 64 if device.tma else 32 if m >= 1024 else 16
    while block > smallest and ceil(m / block) < device.multiprocessors:
        block //= 2
    step = 128 if block <= 32 and block_r <= 64 else 64
    blocks = ceil(m / block)
    split_k = 1
    while (
        split_k < 16
        and blocks * split_k * 2 <= device.multiprocessors
        and k // (split_k * 2) >= 1024
    ):
        split_k *= 2
    found = RankWideConfig(block, step, 4, 3 if block_r > 64 else 4, split_k)
    # AMD's shared memory holds fewer long steps.
    fits = found.shared_bytes(size, block_r) <= device.shared_bytes
    return found if fits else replace(found, step=64)


def wgrad_config(
    m: int, columns: int, device: Device, block_r: int, size: int = 2
) -> RankWideConfig:
    """Tiles of out[columns, r] = xᵀ·t: columns stay, m is summed."""
    if size == 4:
        return RankWideConfig(32, 32, 4, 2)
    block = 64 if block_r <= 64 else 32
    blocks = ceil(columns / block)
    split_k = 1
    # Parts cost bytes of their own, and a launch to add them. So only if few programs would run.
    while (
        split_k < 16
        and blocks * split_k * 4 <= device.multiprocessors
        and m // (split_k * 2) >= 1024
    ):
        split_k *= 2
    return RankWideConfig(block, 64, 4, 3 if block_r > 64 else 4, split_k)


def split_size(total: int, split_k: int, step: int) -> int:
    """Elements of one of `split_k` parts, in whole steps."""
    return ceil(ceil(total / split_k) / step) * step
