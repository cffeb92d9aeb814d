"""`bench tune` of two points: every strategy and tile, compiled many at a time first, so that what
does not compile, or takes its process down, is left out of the measuring and named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from bench.gpu import tune
from bench.gpu.measurer import Candidate, Measurer, Point, Timing
from bench.runner import FAILED, Settings
from lora_kernels.ops.common.configs import GENERIC, GemmConfig
from lora_kernels.ops.common.launch import Executor, planned_device, use_executor
from tools.gpu import files, pool
from tools.gpu.context import Context
from tools.gpu_proofs.commands import shape_of

SHAPE, TINY = "2048,4096,4096,16", "8,32,32,4"
# Forward without dropout, backward with it, both over a dense weight.
ONLY = r"_fwd .*bfloat16$|_bwd .*bfloat16 dropout$"
SETTINGS = Settings(seconds=0.1, min_rounds=5)


class OnCpu(Executor):
    """Plans for an imaginary GPU of two tiles, in Triton's interpreter."""

    on_cpu = True
    device = replace(
        GENERIC, gpu="dry run", tiles=(GemmConfig(64, 64, 32, 4, 2), GemmConfig(16, 16, 32, 2, 2))
    )


def _planned(device: str) -> AbstractContextManager[None]:
    return use_executor(OnCpu()) if device == "cpu" else nullcontext()


def _points(device: str) -> list[Point]:
    every = tune.points([shape_of(TINY if device == "cpu" else SHAPE)])
    return [p for p in every if re.search(ONLY, str(p))]


def _candidates(device: str) -> list[tuple[Point, Candidate]]:
    plan = planned_device(torch.device(device))
    return [(p, c) for p in _points(device) for c in tune.candidates(p, plan)]


def run(context: Context) -> None:
    device = torch.device(context.device)
    with _planned(context.device):
        every = _candidates(context.device)
        bad: dict[tuple[Point, Candidate], str] = {}

        def tell(done: pool.Done) -> None:
            if done.status != files.OK:
                bad[every[done.job.arguments["index"]]] = f"{done.status}: {done.note}"
                print(f"{done.status}: {done.job.name}: {done.note}", flush=True)

        pool.run(
            [
                pool.Job(
                    f"{point}: {candidate}",
                    "tools.gpu.steps.tune:try_one",
                    {"index": i, "device": context.device},
                    limit=40,
                )
                for i, (point, candidate) in enumerate(every)
            ],
            context.processes,
            tell,
        )
        measurer = Measurer(device, replace(SETTINGS, min_rounds=1) if context.dry else SETTINGS)

        def measure(point: Point, candidates: Sequence[Candidate]) -> list[Timing]:
            """Those that ran in the pool; the others have failed already."""
            good = [c for c in candidates if (point, c) not in bad]
            timed = {t.candidate: t for t in measurer(point, good)}
            return [
                timed.get(c) or Timing(c, FAILED, bad[point, c].splitlines()[0])
                for c in candidates
            ]  # fmt: skip

        shape = TINY if context.dry else SHAPE
        status = tune.run(
            device, [shape], SETTINGS, context.work / files.TUNING, measure, only=ONLY
        )
    words = f"{len(every)} ways of two points, {len(bad)} do not run; status {status}"
    context.answer(status == 0, words, failed={f"{p}: {c}": note for (p, c), note in bad.items()})


def try_one(index: int, device: str) -> dict[str, Any]:
    """Run a candidate once."""
    with _planned(device):
        point, candidate = _candidates(device)[index]
        where = torch.device(device)
        once = Settings(seconds=0.0, min_rounds=1, max_rounds=1)
        (timing,) = Measurer(where, once)(point, [candidate])
    if timing.status == FAILED:
        raise RuntimeError(timing.note)
    return {"status": timing.status}
