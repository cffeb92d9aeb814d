"""Every op on every backend, once, held to the error budget: what cannot run at all shows here.

Each call runs in a process that it may take down: a device-side assert costs its own call alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from lora_kernels.dispatch import BACKENDS, ops
from lora_kernels.dispatch.registry import refusal
from tools.gpu import files, pool
from tools.gpu.context import Context

# What a dry run has Triton's interpreter do: of some others a core case takes it half a minute.
INTERPRETED = ("lora_linear_fwd", "nf4_dequantize", "nf4_linear_fwd", "glu_bwd", "dora_linear_fwd")


def run(context: Context) -> None:
    jobs = [
        pool.Job(
            f"{op} {backend}",
            "tools.gpu.steps.smoke:call",
            {"op": op, "backend": backend, "device": context.device},
            limit=45,
        )
        for backend in BACKENDS
        for op in ops()
        if not context.dry or backend != "triton" or op in INTERPRETED
    ]
    statuses: dict[str, Counter[str]] = {backend: Counter() for backend in BACKENDS}

    def tell(done: pool.Done) -> None:
        op, backend = done.job.name.split()
        status, note = verdict(done)
        statuses[backend][status] += 1
        context.row(op, status, note, backend=backend, seconds=f"{done.seconds:.1f}")

    pool.run(jobs, context.processes, tell)
    words = "; ".join(
        f"{backend}: " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        for backend, counts in statuses.items()
    )
    useless = [b for b, counts in statuses.items() if 2 * _bad(counts) > counts.total()]
    if useless:
        context.answer(
            False, f"most calls of {' and '.join(useless)} fail, so the run stops: {words}",
            stop=True,
        )  # fmt: skip
    context.answer(not any(map(_bad, statuses.values())), words)


def _bad(counts: Counter[str]) -> int:
    return sum(counts[status] for status in files.BAD)


def verdict(done: pool.Done) -> tuple[str, str]:
    """A job's status in correctness.csv, and its note: a failed assertion is a wrong result."""
    if done.status == files.FAILED and done.note.startswith("AssertionError"):
        return files.WRONG, done.note.removeprefix("AssertionError: ")
    if done.status != files.OK:
        return done.status, done.note
    return done.value.get("status", files.OK), done.value.get("note", "")


def call(op: str, backend: str, device: str) -> dict[str, Any]:
    """One of the op's core cases, beside the reference and fp64; the first that is taken."""
    from tests.ops.inputs import cases
    from tests.ops.parity import assert_agrees
    from tests.ops.variants import Variant, accepts

    variant, reason = Variant(backend, device), "has no implementation of this op"
    for case in cases(op):
        if not case.core:
            continue
        args = case.build(device)  # by other ops, which are free to run anywhere
        with variant.active():
            taken = accepts(op, backend, args)
            if not taken:
                reason = refusal(op, backend, *args) or reason
        if taken:
            assert_agrees(case, device, variant.active, repeat=device != "cpu")
            return {"note": case.label}
    return {"status": files.REFUSED, "note": reason}
