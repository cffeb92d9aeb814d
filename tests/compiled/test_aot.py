"""Every kernel with every tile compiles for every target, and the code holds what it should: no
stack, no spills, shared memory that exists, tensor cores, 16-byte loads, and no register that
changes while a product reads it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tests.compiled.families import on_another_release
from tests.ops.grid import family
from tools.gpu_proofs import resources
from tools.gpu_proofs.compile import GPU_TARGETS, Compiled, compile_launch

# By target: for tiles of 64 rows or more, and for smaller ones. Below 64 rows Hopper's and
# Blackwell's own instructions do not exist, and Triton falls back to Ampere's.
TENSOR_CORES = {
    "sm_80": ("HMMA", "HMMA"),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": (r"UTC\w*MMA", "HMMA"),
    "gfx942": ("v_mfma", "v_mfma"),
}
# What moves matrices; the others add a few partial sums or make a mask.
STREAMING = re.compile(
    f"{resources.PRODUCTS.pattern}|shrink|grad_pass|wgrad|splitk_reduce|glu|quantize_kernel"
)

RUN_HERE = ("sm_80", "sm_90")  # what the emulator executes


def _parameters():
    elsewhere = on_another_release()
    for target in GPU_TARGETS.values():
        for call in resources.calls(target):
            # Their tiles hold what one dense layer's do, which are compiled in every run.
            like = call.tile and (call.quantised or call.op.startswith("lora_packed"))
            feature = target.name if elsewhere else f"{target.name} {call.op}"
            marks = [pytest.mark.grid(feature, family=family(call.op))]
            marks += [pytest.mark.slow] if like and target.name not in RUN_HERE else []
            yield pytest.param(target.name, call, id=f"{target.name}-{call}", marks=marks)


def _wrong(made: Compiled, tile: dict[str, int]) -> list[str]:
    """Facts of a compiled launch that must not be; of another release than the one of every commit
    those that a result or a launch would fail by."""
    facts, target = made.facts, made.target
    found = list(facts.overwritten)
    if facts.shared > target.device.shared_bytes:
        found.append(f"{facts.shared} of {target.device.shared_bytes} bytes of shared memory")
    if on_another_release():
        return found
    if facts.stack or facts.spills:
        found.append(f"{facts.stack} bytes of stack, {facts.spills} spills")
    if resources.PRODUCTS.search(made.name):
        expected = TENSOR_CORES[target.name][tile["BM"] < 64]
        if not any(re.fullmatch(expected, name) for name in facts.tensor):
            found.append(f"no {expected}, but {facts.tensor or 'no tensor cores'}")
    # AMD's 64 lanes share a small tile in 8 bytes each.
    if target.backend == "cuda" and STREAMING.search(made.name) and not facts.wide_loads:
        found.append(f"no 16-byte loads, but {facts.loads}")
    # x comes by descriptor there, and a branch has loads of its own.
    codes_alone = tile.get("CHUNK") and tile.get("TMA") and tile.get("STRATEGY") == "base"
    if target.backend == "cuda" and codes_alone and not facts.loads.get(16):
        found.append(f"no 16-byte loads of codes, but {facts.loads}")
    return found


@pytest.mark.parametrize(("name", "call"), list(_parameters()))
def test_code_holds_what_it_should(name: str, call: resources.Call):
    wrong = []
    launches = resources.launches(call, GPU_TARGETS[name])
    assert launches, "nothing to compile"
    for launch in launches:
        made = compile_launch(launch, GPU_TARGETS[name])
        tile = resources.tile_of(launch.constants, launch.warps, launch.stages)
        wrong += [
            f"{made.name} {tile}: {made.facts.registers} registers: {w}"
            for w in _wrong(made, launch.constants)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_recording_a_large_call_takes_no_memory():
    """Nothing reads its tensors, of which one alone has 224 MiB; filled, they took 1.4 GiB."""
    call = resources.Call("glu_bwd", (8192, 14336, 0, 0), 0.0, "silu")
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    launches = resources.launches(call, GPU_TARGETS["sm_90"])
    assert _kib("VmHWM") - before < 64 * 1024
    assert sum(t.nbytes for t in launches[0].args.values() if isinstance(t, Tensor)) > 2**30
    assert torch.utils.deterministic.fill_uninitialized_memory  # for all that is computed


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1])
