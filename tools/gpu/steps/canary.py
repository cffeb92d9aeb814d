"""The products that compilers have got wrong on Hopper: a left side that is masked, or scaled, in
registers. Each is held to the error budget, then run again and again: a result that differs from
the first in any bit is a race.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.gpu.measurer import Point
from lora_kernels.ops.common.configs import GENERIC, GemmConfig
from lora_kernels.ops.common.launch import Executor, planned_device, use_executor
from lora_kernels.ops.common.strategies import choose, explain_config, use_strategy
from tests.device.calls import TINY, Call, Sizes, low, make
from tests.ops.variants import bits
from tools.gpu import files, pool
from tools.gpu.context import Context
from tools.gpu.steps.smoke import verdict

REPEATS = 200
DROPOUT = 0.1
N = K = 4096
RANK = 16
WIDE = (
    GemmConfig(128, 256, 64, 8, 3, tma=True),
    GemmConfig(128, 256, 32, 8, 4, tma=True),
    GemmConfig(128, 256, 32, 8, 3),
)
SMALL = GemmConfig(64, 64, 32, 4, 2)  # for a dry run


@dataclass(frozen=True)
class Canary:
    """A call of a public function. With a tile: `lora_linear`'s forward alone by `single_pass` and
    that tile; without: forward and backward as the cost model chooses, or by a strategy."""

    function: str
    m: int
    dropout: float = DROPOUT
    strategy: str | None = None
    tile: GemmConfig | None = None

    def __str__(self) -> str:
        way = f" {self.strategy}" if self.strategy else ""
        tile = f" {self.tile}" if self.tile else ""
        return f"{self.function} M={self.m} p={self.dropout:g}{way}{tile}"


CANARIES = (
    Canary("lora_linear", 8192, strategy="single_pass", tile=WIDE[0]),
    Canary("dora_linear", 8192),
    Canary("lora_linear", 2048, strategy="single_pass", tile=WIDE[0]),
    Canary("dora_linear", 2048),
    Canary("lora_linear", 4096, strategy="single_pass"),
    Canary("lora_packed_linear", 4096),
    Canary("dora_linear", 8192, dropout=0.0),
    Canary("lora_linear", 4096, strategy="single_pass", tile=WIDE[1]),
    Canary("lora_linear", 4096, strategy="single_pass", tile=WIDE[2]),
    Canary("nf4_lora_linear", 4096),
    Canary("dora_linear", 2048, dropout=0.0),
    Canary("lora_mlp", 2048),
    Canary("lora_linear", 8192, strategy="epilogue"),
)
TRIED = (
    Canary("lora_linear", 5, strategy="single_pass", tile=SMALL),
    Canary("dora_linear", 5),
)


def jobs(context: Context, repeats: int, limit: float) -> list[pool.Job]:
    """A job for each canary; none but the first call where `repeats` is 0."""
    return [
        pool.Job(
            str(canary),
            "tools.gpu.steps.canary:run_one",
            {"canary": asdict(canary), "device": context.device, "repeats": repeats},
            limit,
        )
        for canary in (TRIED if context.dry else CANARIES)
    ]


def run(context: Context) -> None:
    bad = []

    def tell(done: pool.Done) -> None:
        status, note = verdict(done)
        if status in files.BAD:
            bad.append(done.job.name)
        context.row(
            done.job.name, status, note, backend="triton", seconds=f"{done.seconds:.1f}"
        )  # fmt: skip

    todo = jobs(context, 2 if context.dry else REPEATS, limit=30)
    pool.run(todo, 1, tell)  # alone: what races does so against itself
    words = f"{len(todo)} calls repeated, {len(bad)} of them wrong"
    context.answer(not bad, words, wrong=bad)


class Forced(Executor):
    """Plans with one tile alone."""

    def __init__(self, device: torch.device, tile: GemmConfig) -> None:
        known = GENERIC if device.type == "cpu" else planned_device(device)
        self.on_cpu = device.type == "cpu"
        self.device = replace(known, gpu=None, tiles=(tile,))


def run_one(canary: dict[str, Any], device: str, repeats: int) -> dict[str, Any]:
    """Check a canary against fp64, and its repeats against its own first result."""
    tile = canary.pop("tile")
    c = Canary(**canary, tile=GemmConfig(**tile) if tile else None)
    dry = device == "cpu"
    sizes = TINY if dry else Sizes(c.m, N, K, RANK)
    call = make(c.function, sizes, device, low(device), c.dropout)
    where = torch.device(device)
    with ExitStack() as stack:
        stack.enter_context(use_strategy(c.strategy))
        if c.tile is not None:
            call.wanted = ()
            stack.enter_context(use_executor(Forced(where, c.tile)))
            refusal = _refusal(c, sizes, where)
            if refusal is not None:
                return {"status": files.REFUSED, "note": refusal}
        elif dry:
            stack.enter_context(use_executor(Forced(where, SMALL)))
        if repeats == 0:
            call.results("triton")
            return {"note": "compiled"}
        return _repeat(call, repeats, where)


def _refusal(c: Canary, sizes: Sizes, device: torch.device) -> str | None:
    """Why the forced tile does not run; None where it does."""
    shape = (sizes.m, sizes.n, sizes.k, sizes.r)
    problem, plan = Point("lora_linear_fwd", shape, c.dropout).problem, planned_device(device)
    try:
        chosen = choose("lora_linear_fwd", problem, plan)
    except ValueError as error:
        return str(error)
    if (chosen.strategy, chosen.config) == (c.strategy, c.tile):
        return None
    estimates = explain_config("lora_linear_fwd", problem, plan).estimates
    return next((e.refusal for e in estimates if e.strategy == c.strategy), None) or (
        f"{chosen.strategy} {chosen.config} would run instead"
    )


def _repeat(call: Call, repeats: int, device: torch.device) -> dict[str, Any]:
    first = call.check("triton")
    differs = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
    most = {name: torch.zeros((), dtype=torch.int64, device=device) for name in first}
    for _ in range(repeats):
        for name, t in call.results("triton").items():
            other = (bits(t) != bits(first[name])).sum()  # stays on the device: nobody waits
            differs[name] += other > 0
            most[name] = torch.maximum(most[name], other)
    raced = {name: int(n) for name, n in differs.items() if int(n)}
    if not raced:
        return {"note": f"{repeats} repeats, the same bits"}
    told = ", ".join(
        f"{name} in {n} of {repeats} repeats, up to {int(most[name])} elements"
        for name, n in raced.items()
    )
    return {"status": files.WRONG, "note": f"a race: {told} differ from the first"}
