"""What the host does: microseconds of Python and launches for a call, without waiting for the GPU,
beside torch's calls in its place; and which ops can be captured in a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.timing import percentile
from lora_kernels import use_backend
from lora_kernels.dispatch import BACKENDS, ops
from tests.device.calls import SCALE, TINY, Call, Sizes, capture, low, make
from tools.gpu import files, pool
from tools.gpu.context import Context

FIELDS = ("kind", "what", "backend", "device", "status", "p20_us", "p50_us", "p80_us", "note")
# Few rows of a small layer: the GPU is done before the host has launched the next call.
SIZES = Sizes(16, 256, 256, 16)
# They look for values that are not finite, on the host, before they encode any.
SET_UP = ("nf4_quantize", "nf4_quantize_scales")
BATCH, BATCHES = 20, 40  # calls between two waits: far fewer than a GPU's queue holds


def run(context: Context) -> None:
    jobs = [
        pool.Job(
            f"time {name} {direction} {backend}",
            "tools.gpu.steps.host:host_time",
            {
                "name": name, "backward": direction == "fwd+bwd", "backend": backend,
                "device": context.device,
            },
        )
        for name in TIMED
        for direction in ("fwd", "fwd+bwd")
        for backend in ("chosen", "torch")
    ]  # fmt: skip
    captures = [
        pool.Job(
            f"graph {op} {backend}",
            "tools.gpu.steps.host:captured",
            {"op": op, "backend": backend, "device": context.device},
        )
        for op in ops()
        for backend in BACKENDS[: 1 if context.dry else 2]
        if op not in SET_UP
    ]
    path = context.work / files.HOST
    path.unlink(missing_ok=True)
    failed = []

    def tell(done: pool.Done) -> None:
        kind, what, *rest = done.job.name.split(" ")
        backend = rest.pop()
        value = done.value or {}
        if done.status != files.OK:
            failed.append(done.job.name)
            print(f"{done.status}: {done.job.name}: {done.note}", flush=True)
        row = {
            "kind": kind, "what": " ".join([what, *rest]), "backend": backend,
            "device": context.device, "status": value.get("status", done.status),
            "note": value.get("note", done.note), **value.get("times", {}),
        }  # fmt: skip
        files.append(path, [row], FIELDS)

    pool.run(jobs, 1, tell)  # alone: a busy neighbour would be in the times
    pool.run(captures, context.processes, tell)
    words = f"{len(jobs)} calls timed on the host, {len(captures)} captures tried"
    context.answer(not failed, f"{words}, {len(failed)} failed", failed=failed)


def _plain_lora(t: dict[str, Tensor]) -> Tensor:
    """The expression that the op replaces, adapters in x's dtype."""
    return linear(t["x"], t["weight"], t["bias"]) + SCALE * linear(linear(t["x"], t["a"]), t["b"])


def _plain_glu(t: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.silu(t["gate"]) * t["up"]


# What is timed, and torch's calls in its place; of nf4_lora_linear those over the decoded weight.
TIMED: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "lora_linear": _plain_lora,
    "nf4_lora_linear": _plain_lora,
    "gated_activation": _plain_glu,
}


def host_time(name: str, backward: bool, backend: str, device: str) -> dict[str, Any]:
    """Microseconds of a call, over batches with a wait before each."""
    cuda = device != "cpu"
    batches, batch = (BATCHES, BATCH) if cuda else (2, 2)
    call = make(name, SIZES if cuda else TINY, device, low(device))
    call.tensors = {key: t.to(low(device)) for key, t in call.tensors.items()}
    step = _step(call, name, backward, backend)
    wait = torch.cuda.synchronize if cuda else lambda: None
    found = []
    with torch.set_grad_enabled(backward):
        for _ in range(3 if cuda else 1):
            step()
        for _ in range(batches):
            wait()
            start = time.perf_counter_ns()
            for _ in range(batch):
                step()
            found.append((time.perf_counter_ns() - start) / batch * 1e-3)
    wait()
    p20, p50, p80 = (f"{percentile(found, q):.2f}" for q in (0.2, 0.5, 0.8))
    kind = "on the host alone" if cuda else "on the CPU, the work included"
    return {"times": {"p20_us": p20, "p50_us": p50, "p80_us": p80}, "note": kind}


def _step(call: Call, name: str, backward: bool, backend: str) -> Callable[[], object]:
    wanted = [key for key in call.wanted if key != "weight"] if backward else []
    leaves = {key: t.requires_grad_(key in wanted) for key, t in call.tensors.items()}

    def forward() -> Tensor:
        made = TIMED[name](leaves) if backend == "torch" else call.run(leaves, False)
        assert isinstance(made, Tensor)
        return made

    if not backward:
        return forward
    given = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), [leaves[key] for key in wanted], given)


def captured(op: str, backend: str, device: str) -> dict[str, Any]:
    """Capture one of the op's core cases, and compare the bits of two replays with the call's."""
    from tests.ops.inputs import cases
    from tests.ops.variants import accepts, bits
    from tools.op_inputs.calls import call

    function = getattr(torch.ops.lora_kernels, op).default
    for case in (c for c in cases(op) if c.core):
        args = case.build(device)
        if accepts(op, backend, args):
            break
    else:
        return {"status": files.REFUSED, "note": "takes no core case"}
    cuda = device != "cpu"
    with use_backend(backend), torch.cuda.device(device) if cuda else nullcontext():
        expected = call(function, args)
        replay = capture(lambda: call(function, args), device)
        replay()
        found = replay()
    for name, t in found.items():
        if not torch.equal(bits(t), bits(expected[name])):
            return {"status": files.WRONG, "note": f"{case.label}: {name} of a replay differs"}
    return {"note": case.label if cuda else f"{case.label}: not captured, needs a GPU"}
