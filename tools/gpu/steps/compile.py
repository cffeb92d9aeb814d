"""Triton's kernels of all that runs later in one process, compiled many at a time.

Each job makes one call, so what it compiles lies in the cache for the steps after it. What does not
compile is named here.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.suites import suite
from tools.gpu import files, pool
from tools.gpu.context import Context
from tools.gpu.steps import canary
from tools.gpu.steps.smoke import verdict

DTYPES = ("bfloat16", "float32", "float16")


def run(context: Context) -> None:
    todo = jobs(context)
    bad = []

    def tell(done: pool.Done) -> None:
        status, note = verdict(done)
        if status in files.BAD:
            bad.append(done.job.name)
        if status != files.OK:
            context.row(
                done.job.name, status, note, backend="triton", seconds=f"{done.seconds:.1f}"
            )  # fmt: skip

    pool.run(todo, context.processes, tell)
    words = f"{len(todo)} calls, {len(bad)} of them failed"
    context.answer(not bad, words, failed=bad)


def jobs(context: Context) -> list[pool.Job]:
    """The dearest first."""
    from tests.device.calls import CALLS, NO_TRITON, RAGGED, ROUND, TINY

    cases = [c.name for c in suite("gpu-tiny" if context.dry else "gpu")]
    sizes = [TINY] if context.dry else [TINY, RAGGED, ROUND]
    names = [name for name in CALLS if name not in NO_TRITON]
    if context.dry:
        cases, names = cases[3:4], names[:2]
    found = canary.jobs(context, repeats=0, limit=45)
    found += [
        pool.Job(
            f"bench {name}",
            "tools.gpu.steps.compile:bench_case",
            {"name": name, "tiny": context.dry, "device": context.device},
            limit=45,
        )
        for name in cases
    ]
    for name in names:
        for size in sizes:
            for dtype in DTYPES[:1] if context.dry else DTYPES:
                arguments = {"name": name, "sizes": vars(size), "dtype": dtype}
                arguments["device"] = context.device
                function = "tools.gpu.steps.compile:function"
                found.append(pool.Job(f"{name} {size} {dtype}", function, arguments, limit=45))
    return found


def bench_case(name: str, tiny: bool, device: str) -> dict[str, Any]:
    """A case of the bench, as our Triton provider runs it."""
    from bench.data import CaseData
    from bench.providers import select
    from lora_kernels.dispatch.op import BackendError

    (provider,) = select("ours:triton")
    (case,) = (c for c in suite("gpu-tiny" if tiny else "gpu") if c.name == name)
    prepared = provider.build(CaseData(case, torch.device(device), rotate_bytes=1))
    try:
        with prepared.context(), torch.set_grad_enabled(prepared.grad):
            prepared.call(0)
    except BackendError as error:
        return {"status": files.REFUSED, "note": str(error)}
    return {}


def function(name: str, sizes: dict[str, int], dtype: str, device: str) -> dict[str, Any]:
    """A public function, forward and backward, without dropout and with."""
    from tests.device.calls import WITH_DROPOUT, Sizes, low, make

    for dropout in (0.0, 0.25) if name in WITH_DROPOUT else (0.0,):
        kind = low(device) if dtype == DTYPES[0] else getattr(torch, dtype)
        call = make(name, Sizes(**sizes), device, kind, dropout)
        call.results("triton")
    return {}
