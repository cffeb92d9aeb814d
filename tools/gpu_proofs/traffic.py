"""`python -m bench traffic`: the bytes that the Triton kernels move, counted by executing their
compiled PTX. No time is measured: it says what memory is asked, not how it answers.

*floor*: each input once and each output once. *unique*: every 32-byte sector once a launch, what
DRAM must move with a perfect L2. *asked*: what the instructions ask for. *sectors*: 32-byte sectors
of each warp instruction. *lane*: mean bytes of a lane's load or store. *instr*: lane-instructions
of PTX without moves and parameters. The vendor's products are modelled: each operand once, the
FLOPs of the product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.ops.common.configs import ConfigExplanation, Device, Estimate, GemmConfig
from lora_kernels.ops.common.launch import use_executor
from lora_kernels.ops.common.strategies import Problem, explain_config
from tools.gpu_proofs import ways
from tools.gpu_proofs.compile import GPU_TARGETS, GpuTarget
from tools.gpu_proofs.emulator import UNCHECKED, Emulated, Emulator, missing
from tools.gpu_proofs.recorder import record
from tools.gpu_proofs.workloads import Workload

OPS = {"forward": "lora_linear_fwd", "backward": "lora_linear_bwd"}
# Where the cost model is asked for the tile: a layer of a 7B model and 8192 tokens.
PLANNED = (8192, 4096, 4096)
_LOADS = re.compile(r"\bld\.(?:\w+\.)*global|\bcp\.async\.c[ag]\.")
_STORES = re.compile(r"\bst\.(?:\w+\.)*global")
_FREE = re.compile(r"(?:@\S+ )?(?:mov\.|ld\.param)")


@dataclass(frozen=True)
class Line:
    """An instruction to look at: its place in the kernel's source and what is wrong there."""

    kernel: str
    place: str
    problem: str
    text: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.place}: {self.problem}: {self.text}"


@dataclass
class Counts:
    """Sums over launches.

    Attributes:
        unique, asked, sectors: bytes.
        loads, stores: bytes and lanes of the loads and stores that are not by descriptor.
        conflicts, accesses: extra wavefronts and accesses of shared memory.
        instructions: of all lanes.
    """

    launches: int = 0
    unique: int = 0
    asked: int = 0
    sectors: int = 0
    loads: tuple[int, int] = (0, 0)
    stores: tuple[int, int] = (0, 0)
    conflicts: int = 0
    accesses: int = 0
    flops: int = 0
    atomics: int = 0
    instructions: int = 0

    def __add__(self, other: Counts) -> Counts:
        def add(a: Any, b: Any) -> Any:
            return tuple(map(sum, zip(a, b, strict=True))) if isinstance(a, tuple) else a + b

        return Counts(**{n: add(v, getattr(other, n)) for n, v in vars(self).items()})

    @property
    def efficiency(self) -> float:
        return self.asked / max(1, self.sectors)


@dataclass
class Part:
    """One kernel of an op, or a vendor's product (then `modelled`)."""

    name: str
    tile: str
    counts: Counts
    modelled: bool = False


@dataclass
class Traffic:
    """A call by one strategy ("" where there is one way) on one target.

    Attributes:
        error: for each output, rms error over that of the correctly rounded result.
        lines: instructions that keep a launch from its bounds.
    """

    workload: Workload
    target: str
    strategy: str
    parts: list[Part]
    error: dict[str, float]
    lines: list[Line] = field(default_factory=list)

    @property
    def whole(self) -> Counts:
        return sum((p.counts for p in self.parts), Counts())

    def over_floor(self, value: int) -> float:
        return value / self.workload.floor


def explain(op: str, r: int, dropout: bool, target: GpuTarget) -> ConfigExplanation:
    """The cost model's table at the planned size."""
    problem = Problem(*PLANNED, r, torch.bfloat16, dropout)
    return explain_config(OPS[op], problem, target.device)


def beyond_product(estimate: Estimate) -> float:
    """Modelled DRAM bytes beside those of the base product alone."""
    m, n, k = PLANNED
    return estimate.dram_bytes - 2 * (m * k + n * k + m * n)


def measure(
    workload: Workload,
    target: GpuTarget,
    strategy: str | None,
    planned: Workload | None = None,
    threads: int = 2,
) -> Traffic:
    """One call by one strategy, counted.

    Args:
        planned: the call of the size whose tile is taken; None: that of `workload` itself.

    Raises:
        FileNotFoundError: nothing can build the emulator.
    """
    reason = missing()
    if reason is not None:
        raise FileNotFoundError(reason)
    device = target.device
    if planned is not None:
        config = _tile(planned, device, strategy)
        device = replace(device, tiles=None if config is None else (config,))
    options = {**UNCHECKED, "threads": threads, "max_instr": 1 << 40}
    emulator = Emulator(int(target.arch), device, options)
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.enter_context(ways.use(strategy))
        stack.enter_context(use_executor(emulator))
        outputs = workload.run()
    exact = workload.exact()
    # A product alone is one output of the layer that it is compared with.
    error = {
        name: _error(got, exact.get(name, next(iter(exact.values()))))
        for name, got in outputs.items()
        if got.numel()
    }
    parts = [_part(run) for run in emulator.runs]
    parts += [_product(left, right) for left, right in emulator.products]
    lines = [line for run in emulator.runs for line in causes(run)]
    return Traffic(workload, target.name, strategy or "", parts, error, lines)


def _tile(workload: Workload, device: Device, strategy: str | None) -> GemmConfig | None:
    """The tile of the large product among a call's launches, if there is one."""
    made = record(device, workload.run, strategy)
    for launch in made:
        args = launch.constants
        if {"BM", "BN", "BK", "GROUP"} <= args.keys():
            blocks = args["BM"], args["BN"], args["BK"]
            return GemmConfig(
                *blocks, launch.warps, launch.stages, args["GROUP"], args.get("TMA", False)
            )
    return None


def _error(got: Tensor, exact: Tensor) -> float:
    """Rms error over that of the correctly rounded result; 1 where that is exact and met."""
    rounded = (exact.to(got.dtype).double() - exact).square().mean().sqrt()
    mine = (got.double() - exact).square().mean().sqrt()
    return float(mine / rounded) if mine or rounded else 1.0


def _part(run: Emulated) -> Part:
    """The counters of one launch."""
    p, args = run.profile, run.launch.constants
    c = p.counters
    shared = [c[k] for k in ("shared_load", "shared_store", "ldmatrix")]
    copies = c["cp_async_shared"]["wavefronts"], c["cp_async_shared"]["conflicts"]
    counts = Counts(
        launches=1,
        unique=p.dram_min_bytes,
        asked=p.global_bytes_requested,
        sectors=p.global_load_sector_bytes + p.global_store_sector_bytes,
        loads=_lanes(p.instr, _LOADS),
        stores=_lanes(p.instr, _STORES),
        conflicts=sum(s["conflicts"] for s in shared) + copies[1],
        accesses=sum(s["requests"] for s in shared) + c["cp_async"]["requests"],
        flops=p.mma_flops,
        atomics=c["global_atomic"]["requests"],
        instructions=sum(i["threads"] for i in p.instr if not _FREE.match(i["text"])),
    )
    return Part(run.name, tile_of(args, run.launch.warps, run.launch.stages), counts)


def tile_of(args: dict[str, Any], warps: int, stages: int) -> str:
    """A launch's tile in words."""
    blocks = [f"{n}={v}" for n, v in args.items() if re.fullmatch(r"B[A-Z]|BLOCK", n)]
    kind = ["tma"] if args.get("TMA") else []
    return " ".join([*blocks, f"w{warps}", f"s{stages}", *kind])


def _product(left: Tensor, right: Tensor) -> Part:
    m, k, n = left.shape[0], left.shape[1], right.shape[1]
    moved = left.element_size() * (m * k + k * n + m * n)
    counts = Counts(1, moved, moved, moved, flops=2 * m * n * k)
    return Part("vendor GEMM", "", counts, modelled=True)


def _lanes(instructions: list[dict[str, Any]], kind: re.Pattern[str]) -> tuple[int, int]:
    chosen = [i for i in instructions if kind.search(i["text"]) and i["bytes"]]
    return sum(i["bytes"] for i in chosen), sum(round(i["bytes"] / _lane(i)) for i in chosen)


def _lane(instruction: dict[str, Any]) -> float:
    """Bytes of a lane. A copy past the end of a loop is issued with no bytes: its width counts."""
    width = re.search(r"cp\.async.*\], (0x\w+|\d+)", instruction["text"])
    if width:
        return int(width[1], 0)
    return float(instruction["bytes"] / max(1, instruction["threads"]))


def causes(run: Emulated) -> Iterator[Line]:
    """Instructions that matter (a hundredth of the launch's bytes, or of its shared accesses) and
    are narrow, scattered, or in conflict."""
    instructions = run.profile.instr
    moved = max(1, run.profile.global_bytes_requested)
    accesses = max(1, sum(i["requests"] for i in instructions if "shared" in i["text"]))
    places = _places(run.profile.compiled.asm["ptx"])
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for i in instructions:
        place = places[i["line"]]
        is_global = _LOADS.search(i["text"]) or _STORES.search(i["text"])
        if is_global and i["bytes"] >= moved / 100:
            lane, share = _lane(i), i["bytes"] / max(1, 32 * i["sectors"])
            if lane < 15.5:
                found.setdefault((place, f"{lane:.1f} B a lane"), (0, i["text"]))
            if share < 0.95:
                found.setdefault((place, f"{share:.0%} of its sectors"), (0, i["text"]))
        if i["conflicts"] > accesses / 100:
            key = (place, "conflicts")
            found[key] = (found.get(key, (0, ""))[0] + i["conflicts"], i["text"])
    for (place, problem), (count, text) in found.items():
        yield Line(run.name, place, f"{count} {problem}" if count else problem, text)


def _places(ptx: str) -> list[str]:
    """The source file and line of each line of PTX (from 1)."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]+)"', ptx, re.M))
    places = [""]
    for line in ptx.splitlines():
        found = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        places.append(f"{files.get(found[1])}:{found[2]}" if found else places[-1])
    return places


def targets_of(names: list[str] | None) -> list[GpuTarget]:
    """Targets whose PTX can be executed.

    Raises:
        ValueError: a name is none of them.
    """
    known = [t for t in GPU_TARGETS.values() if t.name in ("sm_80", "sm_90")]
    for name in names or []:
        if name not in [t.name for t in known]:
            raise ValueError(f"target: got {name!r}, expected one of sm_80, sm_90")
    return [t for t in known if not names or t.name in names]
