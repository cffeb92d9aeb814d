"""The compiled PTX of every kernel, executed on the CPU for sm_80 and sm_90 with every check on:
bounds, races, missing waits, reads of shared memory that nobody wrote. Of sm_90 the machine code is
read as well, for registers that change while a product reads them.

It tests what the compiler wrote. Results are held against the oracle through the one budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import use_executor
from tests.compiled.families import calls, on_another_release
from tests.compiled.problems import Problem
from tests.ops.case import Case
from tests.ops.grid import grid
from tests.ops.parity import assert_agrees
from tools.gpu_proofs import emulator, ways
from tools.gpu_proofs.compile import GPU_TARGETS, overwritten_in
from tools.gpu_proofs.emulator import Emulator

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    emulator.missing() is not None, reason=emulator.missing() or "the PTX emulator is there"
)

DEVICES = {80: GPU_TARGETS["sm_80"].device, 90: GPU_TARGETS["sm_90"].device}
# Of the kernels that a release of Triton compiled wrongly, or not at all: in every sample.
KNOWN_FAULTS = (
    "lora_linear_fwd-sm_90-single_pass-whole-tiles",
    "lora_linear_bwd-sm_90-epilogue-whole-tiles",
    "lora_packed_fwd-sm_90-single_pass-three",
    "lora_packed_bwd-sm_90-epilogue-three",
    "dora_linear_fwd-sm_90-whole-tiles",
    "dora_linear_fwd-sm_90-tma-plain",
    "dora_linear_bwd-sm_90-whole-tiles",
    "nf4_quantize-sm_90-7x31-bfloat16-fp4-b4096-nested",
)


@dataclass
class Way:
    """Runs ops through the emulator by one strategy and one tile, and keeps its reports."""

    cc: int
    device: Device
    strategy: str | None = None
    runs: list[Emulator] = field(default_factory=list)

    @contextmanager
    def active(self) -> Iterator[None]:
        self.runs.append(Emulator(self.cc, self.device, {"check": False}))
        with ExitStack() as stack:
            stack.enter_context(use_backend("triton"))
            stack.enter_context(ways.use(self.strategy))
            stack.enter_context(use_executor(self.runs[-1]))
            yield

    def faults(self) -> list[str]:
        """What the emulator found wrong, whatever the results were."""
        launches = [run for e in self.runs for run in e.runs]
        found = [f"{run.name}: {run.profile.error}" for run in launches if run.profile.error]
        found += [
            f"{r.name}: {r.profile.shared_bytes} bytes of shared memory"
            for r in launches
            if r.profile.shared_bytes > self.device.shared_bytes
        ]
        found += [f"{r.name}: {x['kind']}: {x['msg']}" for r in launches for x in r.profile.reports]
        if self.cc == 90:  # what ptxas wrote, beyond the PTX
            made = {(r.name, r.profile.compiled.asm["cubin"]) for r in launches}
            found += [f"{name}: {w}" for name, c in made for w in overwritten_in(c)]
        return list(dict.fromkeys(found))


def _parameters():
    elsewhere = on_another_release()
    for problem, case in calls():
        args = case.build()
        for cc in DEVICES:
            for strategy in problem.strategies:
                name = "-".join(filter(None, (case.op, f"sm_{cc}", strategy, problem.name)))
                mark = grid(case, args, f"sm_{cc} {strategy}")
                if elsewhere:
                    mark = pytest.mark.grid(f"sm_{cc}", **mark.kwargs)
                marks = [mark]
                marks += [pytest.mark.slow] if problem.slow else []
                marks += [pytest.mark.always] if name in KNOWN_FAULTS else []
                yield pytest.param(cc, strategy, problem, case, id=name, marks=marks)


@pytest.mark.parametrize(("cc", "strategy", "problem", "case"), list(_parameters()))
def test_ptx_agrees_and_is_free_of_faults(
    cc: int, strategy: str | None, problem: Problem, case: Case
):
    tiles = (problem.tiles[cc],) if problem.tiles else None
    device = replace(DEVICES[cc], tiles=tiles)
    few = problem.multiprocessors
    way = Way(cc, replace(device, multiprocessors=few) if few else device, strategy)
    error = None
    try:
        assert_agrees(case, "cpu", way.active, repeat=False)
    except AssertionError as wrong:
        error = wrong
    faults = way.faults()
    assert not faults, "\n".join([*faults, f"result: {error or 'right'}"])
    if error is not None:
        raise error
    assert any(e.runs for e in way.runs), "nothing was launched"


@pytest.mark.parametrize("cc", DEVICES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 41), (33, 130)])
@pytest.mark.parametrize("seed", [0, -1, 0x123456789ABCDEF])
def test_mask_has_the_bits_of_the_reference(seed: int, rows: int, cols: int, cc: int):
    way = Way(cc, DEVICES[cc])
    op = torch.ops.lora_kernels.dropout_mask.default
    args = (torch.tensor([seed]), rows, cols, 0.3, 2**32 - 1 if seed else 3)
    with way.active():
        mask = op(*args)
    with use_backend("reference"):
        assert torch.equal(mask, op(*args))
    assert not way.faults()
