"""`python -m bench traffic` and `resources` on small shapes, as processes of their own: kernels are
compiled there, which TRITON_INTERPRET=1 would forbid. And what is counted, on made-up counts."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.ops.common.configs import GEMM_CONFIGS
from tests.ops.parity import Result, hold_draws
from tools.gpu_proofs import emulator
from tools.gpu_proofs.baselines import LORAFUSION_SIZES, Sizes, baselines
from tools.gpu_proofs.compile import GPU_TARGETS
from tools.gpu_proofs.resources import calls
from tools.gpu_proofs.resources import targets_of as resource_targets
from tools.gpu_proofs.traffic import OPS, Counts, Part, Traffic, beyond_product, explain, targets_of
from tools.gpu_proofs.traffic_table import misses, reached, rows
from tools.gpu_proofs.workloads import FAMILIES, Workload, families_of, workloads
from tools.op_inputs.source import Hollow, Source

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    not any((Path(p) / "triton").is_dir() for p in sys.path), reason="triton is not installed"
)
needs_emulator = pytest.mark.skipif(
    emulator.missing() is not None, reason=emulator.missing() or "the PTX emulator is there"
)


def _bench(*args: str) -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", *args]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.slow
@needs_triton
@needs_emulator
def test_traffic_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    args = ("--target", "sm_80", "--shape", "64,64,96,8", "--own-tile")
    code, out = _bench("traffic", *args, "--output", str(path))
    assert code == 0, out
    lines = list(csv.DictReader(path.open()))
    whole = {(line["op"], line["way"]): line for line in lines if line["kernel"] == "whole"}
    for op in OPS:
        for way in ("single_pass", "epilogue", "addmm", "plain PyTorch", "addmm_ order"):
            assert float(whole[op, way]["unique"]) >= 0.99, (op, way)
    for op, way in whole:
        assert op in OPS or float(whole[op, way]["unique"]) >= 0.9, (op, way)
    assert {op.split()[0] for op, _ in whole} == {*OPS, *FAMILIES} - {"lora"}
    assert whole["forward", "single_pass"]["launches"] == "1"
    assert {line["triton"] for line in lines} != {""}
    assert "MB beyond the base product" in out and "this shape" in out
    assert "LoRAFusion" not in out  # it was counted on another shape


@pytest.mark.slow
@needs_triton
@needs_emulator
def test_shared_memory_is_read_without_conflicts_and_dora_rounds_twice(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    families = ("--family", "lora", "--family", "dora")
    args = (*families, "--target", "sm_80", "--shape", "256,256,256,16", "--output", str(path))
    code, out = _bench("traffic", *args)
    assert code == 0, out
    lines = [line for line in csv.DictReader(path.open()) if line["conflicts"]]
    assert {line["dropout"] for line in lines} == {"0.0", "0.1"}
    for line in lines:
        assert float(line["conflicts"]) <= 0.05, line
    (back,) = [e["error"] for e in lines if e["op"] == "dora backward" and e["dropout"] == "0.0"
               and e["kernel"] == "whole"]  # fmt: skip
    errors = dict(part.split("=") for part in back.split())
    # dy times the magnitude, and the result: ds is not rounded as well.
    assert float(errors["dx"]) <= 1.5 and float(errors["da"]) <= 1.5


@pytest.mark.slow
@needs_triton
def test_resources_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "resources.csv"
    args = ("--target", "sm_80", "--target", "gfx942", "--only", "addmm M=16 ")
    code, out = _bench("resources", *args, "--output", str(path))
    assert code == 0, out
    lines = list(csv.DictReader(path.open()))
    assert {line["target"] for line in lines} == {"sm_80", "gfx942"}
    for line in lines:
        assert int(line["registers"]) > 0 and int(line["blocks"]) > 0
        assert int(line["shared"]) <= GPU_TARGETS[line["target"]].device.shared_bytes


def test_what_is_asked_wrongly_is_named() -> None:
    for args in (
        ("traffic", "--shape", "1,2,3"),
        ("traffic", "--target", "sm_100"),
        ("traffic", "--family", "lorafusion"),
        ("resources", "--target", "sm_12"),
    ):
        code, out = _bench(*args)
        assert code == 2, out
        assert args[-1] in out


def test_targets_are_found_by_name() -> None:
    assert [t.name for t in targets_of(None)] == ["sm_80", "sm_90"]
    assert [t.name for t in resource_targets(["gfx942"])] == ["gfx942"]


@pytest.mark.parametrize("target", GPU_TARGETS.values(), ids=lambda t: t.name)
def test_every_tile_of_a_target_is_compiled(target) -> None:
    """Each tile that the device may take appears in a call, hardware copies where they exist."""
    used = {call.tile for call in calls(target)} - {None}
    for config in GEMM_CONFIGS:
        fits = config.shared_bytes(2) <= target.device.shared_bytes
        if fits and (target.device.tma or not config.tma):
            assert config in used, str(config)
        if not target.device.tma:
            assert all(not tile.tma for tile in used)


def test_floors_are_those_of_the_peers() -> None:
    """The same 6208 and 8320 kB that the peers' counts are divided by."""
    assert LORAFUSION_SIZES.floor == {"forward": 6208 << 10, "backward": 8320 << 10}


@pytest.mark.parametrize("family", FAMILIES)
def test_workloads_give_what_fp64_gives(family: str) -> None:
    """The arguments fit their op, whose result on this machine is within the budget."""
    draws = []
    for seed in range(4):
        made = workloads(families_of([family]), (24, 64, 96, 4), 0.0, Source(seed))
        draws.append([_beside_exact(w) for w in made])
    for workload, *results in zip(made, *draws, strict=True):
        for name in results[0]:
            hold_draws([found[name] for found in results], f"{workload.name}: {name}")


def _beside_exact(workload: Workload) -> dict[str, Result]:
    """Each output by the backend that is chosen, in fp64, and by plain PyTorch."""
    got, exact = workload.run(), workload.exact()
    with use_backend("reference"):
        plain = workload.run()
    assert list(got) == list(exact) == list(plain)
    assert workload.floor >= sum(t.nbytes for t in got.values() if t.numel()) / 2
    assert workload.outputs <= sum(t.numel() for t in got.values())
    return {n: (t, exact[n].double(), plain[n]) for n, t in got.items() if t.numel()}


def test_hollow_workloads_have_the_sizes() -> None:
    """What launches depend on, without the numbers."""
    shape = (24, 32, 64, 4)
    for full, hollow in zip(
        workloads(FAMILIES, shape, 0.0, Source()),
        workloads(FAMILIES, shape, 0.0, Hollow()),
        strict=True,
    ):
        assert _shapes(full.args) == _shapes(hollow.args)


def _shapes(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_shapes(v) for v in value]
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def test_models_grow_with_dropout() -> None:
    z = Sizes(512, 256, 1024, 8)
    for op in OPS:
        plain, dropped = (baselines(z, op, d) for d in (False, True))
        for before, after in zip(plain, dropped, strict=True):
            assert before.source.startswith("modelled") and after.unique > before.unique >= 1


def test_addmm_order_forward_by_hand() -> None:
    z = LORAFUSION_SIZES
    mb, rank_wide = 2 << 20, 32 << 10
    expected = (3 * mb) + (mb + 2 * rank_wide) + (2 * mb + 2 * rank_wide)
    found = next(r for r in baselines(z, "forward", False) if r.name == "addmm_ order")
    assert found.unique == expected / z.floor["forward"] and found.launches == 3


def _traffic(**changes: int) -> Traffic:
    z = Sizes(64, 64, 64, 16)
    figures = {"unique": z.floor["forward"], "asked": 3 * z.floor["forward"], "accesses": 100}
    figures |= {"sectors": figures["asked"], "flops": z.flops["forward"], "launches": 1}
    part = Part("_lora_gemm_kernel", "BM=64 BN=64", Counts(**(figures | changes)))
    floor, flops = z.floor["forward"], z.flops["forward"]
    workload = Workload("forward", "lora_linear_fwd", [], z, 0.0, floor, flops, 64 * 64)
    return Traffic(workload, "sm_80", "single_pass", [part], {"y": 1.1})


def test_targets_kept_and_missed() -> None:
    assert not misses(_traffic())
    floor = _traffic().workload.floor
    for name, value, words in (
        ("unique", floor * 2, "unique / floor 2.000"),
        ("asked", floor * 6, "asked / floor 6.000"),
        ("atomics", 1, "atomics"),
        ("conflicts", 10, "conflicts / access 0.100"),
        ("launches", 2, "launches 2.000"),
        ("sectors", floor * 6, "sector efficiency 0.500"),
    ):
        found = misses(_traffic(**{name: value}))
        assert any(words in line for line in found), (name, found)
    assert len(list(reached(_traffic()))) >= 6


def test_a_row_a_kernel_and_one_a_whole_op() -> None:
    lines = list(rows([_traffic()]))
    assert [line["kernel"] for line in lines][:2] == ["whole", "_lora_gemm_kernel"]
    assert {line["way"] for line in lines} == {"single_pass", "plain PyTorch", "addmm_ order"}


@pytest.mark.parametrize("target", targets_of(None), ids=lambda t: t.name)
def test_the_model_says_that_single_pass_adds_least(target) -> None:
    single, epilogue, addmm = explain("forward", 16, False, target).estimates
    assert 0 < beyond_product(single) < beyond_product(epilogue) < beyond_product(addmm)
    # s and both adapters; x and y are the product's own.
    assert beyond_product(single) == 2 * 16 * (8192 + 4096 + 4096)
