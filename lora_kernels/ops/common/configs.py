"""Configurations of the Triton kernels and the cost model that chooses among them.

The model counts: FLOPs against the tensor cores' peak, bytes that DRAM must move, bytes that tiles
ask of L2, waves of programs over the multiprocessors, and launches. What it says is modelled, not
measured; its inputs are the makers' data sheets. A table written by `python -m bench tune` has
precedence if it has an entry for the call (`tuned.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil

import torch


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU.

    Attributes:
        name: as torch names it, or a part of that.
        multiprocessors: streaming multiprocessors (compute units on AMD).
        shared_bytes: shared memory that one program may ask for.
        bandwidth, l2_bandwidth: bytes/s of DRAM and of L2.
        matrix_flops: of 16-bit tensor cores, dense, FLOP/s.
        fp32_flops: of fp32 multiply-adds, FLOP/s; integer operations are taken at half of it.
        tma: whether the hardware copies by tensor descriptors.
        rank_sums: whether a product of 64 rows or more may carry the rank's sums as well. Triton
            3.9's code of it for Blackwell has been neither run nor emulated.
        sum_registers: registers of a thread that sums may take, beside all else it needs.
        launch_seconds: between two dependent launches.
        tiles: the tiles to choose among, `GEMM_CONFIGS` by default. Tests force tiles with it.
        gpu: torch's name of this GPU. None for a GPU that is only planned for, without
            measurements.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    bandwidth: float
    l2_bandwidth: float
    matrix_flops: float
    fp32_flops: float
    tma: bool = False
    rank_sums: bool = True
    sum_registers: int = 144
    launch_seconds: float = 3e-6
    tiles: tuple[GemmConfig, ...] | None = None
    gpu: str | None = None


# Data sheets; L2 from bytes a clock and the boost clock. The generic row is a small Ampere card.
GENERIC = Device("generic", 80, 101376, 0.7e12, 2e12, 140e12, 18e12)
DEVICES = (
    Device("A100", 108, 166912, 1.55e12, 5e12, 312e12, 19.5e12),
    Device("H100", 132, 232448, 3.35e12, 7e12, 989e12, 67e12, tma=True),
    Device("H200", 132, 232448, 4.8e12, 7e12, 989e12, 67e12, tma=True),
    Device("B200", 148, 232448, 8.0e12, 10e12, 2250e12, 75e12, tma=True, rank_sums=False),
    Device("MI300", 304, 65536, 5.3e12, 10e12, 1307e12, 163e12, sum_registers=128),
)


@cache
def device_of(device: torch.device) -> Device:
    """The row of a torch device; an unknown one is the generic row with its own sizes."""
    if device.type != "cuda":
        return GENERIC
    properties = torch.cuda.get_device_properties(device)
    row = next((d for d in DEVICES if d.name in properties.name), None)
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if row is None:
        capability = torch.cuda.get_device_capability(device)
        tma = torch.version.hip is None and capability >= (9, 0)
        row = replace(
            GENERIC, name=properties.name, tma=tma, rank_sums=not tma or capability < (10, 0)
        )
    return replace(
        row,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=shared or row.shared_bytes,
        gpu=properties.name,
    )


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a kernel with a full product in it: [block_m, block_n] over steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False

    def __str__(self) -> str:
        kind = " tma" if self.tma else ""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} warps {self.warps} stages {self.stages}{kind}"

    def shared_bytes(self, size: int, block_r: int = 0) -> int:
        """Of the tiles being loaded; block_r > 0 if there is a third operand [block_k, block_r]."""
        depth = self.stages if self.tma else max(1, self.stages - 1)
        tile = (self.block_m + self.block_n + block_r) * self.block_k * size
        # The epilogue exchanges a tile of y between the threads.
        return max(depth * tile, self.block_m * self.block_n * size)

    def registers(self, block_r: int, masked: int, held: int = 0) -> int:
        """Of a thread's sums; a mask over the tile takes as many again while it is made. `held`:
        bytes of an element of x where its tile is held beside them."""
        sums = self.block_m * (self.block_n * (1 + masked) + block_r)
        return (sums + self.block_m * self.block_k * held // 4) // (32 * self.warps)


GEMM_CONFIGS = (
    GemmConfig(128, 256, 64, 8, 3, tma=True),
    GemmConfig(128, 256, 32, 8, 4, tma=True),
    GemmConfig(128, 128, 64, 8, 4, tma=True),
    GemmConfig(128, 64, 64, 8, 4, tma=True),
    GemmConfig(64, 128, 64, 4, 4, tma=True),
    GemmConfig(64, 64, 64, 4, 4, tma=True),
    GemmConfig(128, 256, 32, 8, 3),
    GemmConfig(128, 128, 32, 8, 4),
    GemmConfig(128, 128, 64, 8, 2),
    GemmConfig(128, 64, 32, 4, 4),
    GemmConfig(128, 64, 32, 8, 4),
    GemmConfig(64, 128, 32, 4, 4),
    GemmConfig(64, 64, 64, 4, 3),
    GemmConfig(32, 64, 64, 4, 4),
    GemmConfig(16, 64, 128, 4, 4),
    GemmConfig(16, 32, 128, 4, 4),
    GemmConfig(16, 16, 256, 4, 3),
    GemmConfig(64, 32, 32, 4, 2),
    GemmConfig(32, 32, 32, 4, 2),
    GemmConfig(16, 16, 32, 2, 2),
)
# Philox4x32-7 for eight elements, an element's share, selection included: integer operations.
PHILOX_OPERATIONS = 14.0
# To decode a weight from 4 bits in a product's main loop, stored for the tensor cores.
DECODE_OPERATIONS = 9.0
# When the time of a tile counts as that of the best, and from how many waves on.
_NEARLY, _MANY_WAVES = 1.06, 4
# fp32 products are unrolled into multiply-adds: a larger tile takes minutes to compile.
_MAX_FP32_TILE = 64 * 64 * 32


def is_valid(
    config: GemmConfig,
    device: Device,
    size: int,
    block_r: int = 0,
    masked: int = 0,
    tma: bool = False,
    masked_x: bool = False,
    quantised: bool = False,
) -> bool:
    """The whole set of constraints on a tile: hardware copies, shared memory and registers.

    Args:
        size: bytes of an element of x.
        block_r: rank columns that the main loop carries (single_pass), else 0.
        masked: tiles of sums that a mask over the result needs beside the result's own.
        tma: whether x and w allow tensor descriptors.
        masked_x: whether the mask of x is applied in the main loop.
        quantised: whether the tile of W is decoded there, in registers.
    """
    # Hopper's products then take x from registers: see `tiles.in_registers`.
    held = size if masked_x and block_r and device.tma else 0
    decoded = config.block_n * config.block_k // (32 * config.warps) if quantised else 0
    if size == 4 and config.block_m * config.block_n * config.block_k > _MAX_FP32_TILE:
        return False
    # With four warps Hopper's products by pointers need more beside the sums: 128 x 64 x 32 with 64
    # ranks, 128 registers of sums, left 8 bytes on the stack.
    pointers = 24 if device.tma and not config.tma and config.warps == 4 else 0
    return (
        ((tma and device.tma) or not config.tma)
        and config.shared_bytes(size, block_r) <= device.shared_bytes
        and config.registers(block_r, masked, held) + decoded <= device.sum_registers - pointers
    )


@dataclass(frozen=True)
class Estimate:
    """What the model says of one way to run an op.

    Attributes:
        dram_bytes: each operand once, per launch that reads it.
        asked_bytes: what the tiles ask of L2.
        flops: matrix FLOPs issued, padding included.
        waves: programs over multiprocessors, rounded up, of the largest launch.
        seconds: modelled.
        refusal: why this way cannot run the call.
        measured: seconds, of the way that a table of measurements prefers.
    """

    strategy: str
    config: GemmConfig | None
    launches: int
    dram_bytes: float
    asked_bytes: float
    flops: float
    waves: int
    seconds: float
    refusal: str | None = None
    measured: float | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower is better: what was measured comes before what is modelled."""
        return self.measured is None, self.seconds


@dataclass(frozen=True)
class ConfigExplanation:
    """Every strategy with its tile and the model's figures; `str()` is a table."""

    title: str
    device: Device
    estimates: tuple[Estimate, ...]

    @property
    def chosen(self) -> Estimate | None:
        """The measured way or the cheapest; None where every one is refused."""
        return min(
            (e for e in self.estimates if e.refusal is None), key=lambda e: e.rank, default=None
        )

    def __str__(self) -> str:
        chosen = self.chosen
        lines = [
            f"{self.title} on {self.device.name} (modelled, not measured)",
            f"  {'strategy':<13}{'launches':>9}{'DRAM MB':>10}{'asked MB':>10}{'GFLOP':>9}"
            f"{'waves':>7}{'µs':>9}  tile",
        ]
        for e in self.estimates:
            mark = "*" if e is chosen else " "
            if e.refusal is not None:
                lines.append(f" {mark}{e.strategy:<13}{e.refusal}")
                continue
            lines.append(
                f" {mark}{e.strategy:<13}{e.launches:>9}{e.dram_bytes / 1e6:>10.1f}"
                f"{e.asked_bytes / 1e6:>10.1f}{e.flops / 1e9:>9.1f}{e.waves:>7}"
                f"{e.seconds * 1e6:>9.1f}  {e.config or 'vendor GEMM'}"
            )
        if chosen is not None and chosen.measured is not None:
            lines.append(
                f"  measured: {chosen.strategy} {chosen.measured * 1e6:.1f} µs, the table's choice"
            )
        return "\n".join(lines)


def best_gemm(
    m: int,
    n: int,
    k: int,
    device: Device,
    size: int,
    *,
    configs: Sequence[GemmConfig] | None = None,
    block_r: int = 0,
    branch: int = 0,
    masked_x: bool = False,
    masked_y: bool = False,
    quantised: bool = False,
    tma: bool = False,
    exactly: bool = False,
) -> tuple[GemmConfig, float, int] | None:
    """The tile of the least modelled time, that time in seconds and its waves; None if none fits.

    Where W is dense and there are many waves, tiles of nearly that time count as equal, and the one
    that asks least of L2 is taken.

    Args:
        m, n, k: of the product.
        size: bytes of an element.
        block_r: rank columns that the main loop carries; each tile of columns repeats them.
        branch: rank columns of the low-rank product that is added.
        masked_x, masked_y: whether the mask of x, or of the result, is regenerated.
        quantised: whether the right side is decoded from 4 bits in the main loop.
        tma: whether the operands allow tensor descriptors.
        exactly: whether only the time counts.
    """
    found = []
    for config in (device.tiles or GEMM_CONFIGS) if configs is None else configs:
        if not is_valid(config, device, size, block_r, masked_y, tma, masked_x, quantised):
            continue
        mask = config.block_m * (k if masked_x else config.block_n if masked_y else 0)
        seconds, waves = _gemm_seconds(
            m, n, k, device, size, config, block_r, branch, mask, quantised
        )
        found.append((config, seconds, waves))
    if not found:
        return None
    best = min(found, key=lambda f: f[1])
    if best[2] < _MANY_WAVES or quantised or exactly:
        return best
    near = [f for f in found if f[1] <= _NEARLY * best[1]]
    return min(near, key=lambda f: gemm_asked_bytes(f[0], m, n, k, size))


def gemm_tiles(config: GemmConfig, m: int, n: int) -> int:
    return ceil(m / config.block_m) * ceil(n / config.block_n)


def gemm_asked_bytes(
    config: GemmConfig, m: int, n: int, k: int, size: int, weight_size: float | None = None
) -> float:
    """What the tiles of a product ask of L2, y included."""
    across, down = ceil(n / config.block_n), ceil(m / config.block_m)
    w = size if weight_size is None else weight_size
    return size * (across * m * k + m * n) + w * down * n * k


def mask_seconds(elements: float, device: Device) -> float:
    """To regenerate mask elements; integers run at half the rate of fp32 multiply-adds."""
    return elements * PHILOX_OPERATIONS / (device.fp32_flops / 4)


def _gemm_seconds(
    m: int,
    n: int,
    k: int,
    device: Device,
    size: int,
    config: GemmConfig,
    block_r: int,
    branch: int,
    mask: int,
    quantised: bool,
) -> tuple[float, int]:
    """Waves of tiles, each bound by the tensor cores, the mask's integers or its bytes from L2."""
    waves = ceil(gemm_tiles(config, m, n) / device.multiprocessors)
    share = device.multiprocessors
    peak = device.matrix_flops if size == 2 else device.fp32_flops
    flops = 2.0 * config.block_m * ((config.block_n + block_r) * k + branch * config.block_n)
    weight = 0.5625 if quantised else size
    asked = (size * (config.block_m + block_r) + weight * config.block_n) * k
    busy = flops / peak + mask_seconds(mask, device)
    if quantised:
        busy += config.block_n * k * DECODE_OPERATIONS / (device.fp32_flops / 2)
    tile_seconds = share * max(busy, asked / device.l2_bandwidth)
    dram = (size * (m * k + m * n) + weight * n * k) / device.bandwidth
    return max(waves * tile_seconds, dram) + device.launch_seconds, waves
