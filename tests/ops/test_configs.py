"""The cost model's configurations: constraints, choices, and what must hold whatever it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lora_kernels.ops.common.configs import (
    DEVICES,
    GEMM_CONFIGS,
    GENERIC,
    GemmConfig,
    best_gemm,
    device_of,
    is_valid,
)
from lora_kernels.ops.common.rank_wide import shrink_config, split_size, wgrad_config
from lora_kernels.ops.common.strategies import (
    MAX_SINGLE_PASS_RANK,
    STRATEGIES,
    Problem,
    choose,
    explain_config,
    use_strategy,
)

OPS = ("lora_linear_fwd", "lora_linear_bwd")
ALL_DEVICES = (GENERIC, *DEVICES)
H100 = next(d for d in DEVICES if d.name == "H100")
A100 = next(d for d in DEVICES if d.name == "A100")
SIZES = ((8192, 4096, 4096), (16, 1024, 4096), (1, 14336, 4096), (33, 7, 31))
by_device = pytest.mark.parametrize("device", ALL_DEVICES, ids=lambda d: d.name)


def test_descriptors_need_hardware_and_rows_that_allow_them():
    tile = GemmConfig(64, 64, 64, 4, 3, tma=True)
    assert is_valid(tile, H100, 2, tma=True)
    assert not is_valid(tile, H100, 2, tma=False)
    assert not is_valid(tile, A100, 2, tma=True)


def test_a_tile_must_fit_shared_memory_and_registers():
    assert not is_valid(GemmConfig(128, 256, 128, 8, 6), A100, 2)
    assert not is_valid(GemmConfig(256, 256, 32, 8, 2), A100, 2)  # 256 sums a thread
    assert is_valid(GemmConfig(128, 128, 32, 8, 4), A100, 2, masked=True)


@pytest.mark.parametrize("size", [2, 4])
@by_device
def test_every_device_has_a_tile_for_every_way(device, size):
    for rank in (0, 16, 64):
        for masked in (False, True):
            assert any(is_valid(c, device, size, rank, masked) for c in GEMM_CONFIGS)


@by_device
def test_the_best_tile_is_a_valid_one(device):
    for m, n, k in SIZES:
        found = best_gemm(m, n, k, device, 2, block_r=16, branch=16, tma=device.tma)
        assert found is not None
        config, seconds, waves = found
        assert is_valid(config, device, 2, 16, tma=device.tma)
        assert seconds > 0 and waves >= 1


def test_a_device_may_name_its_only_tiles():
    only = GemmConfig(32, 32, 32, 4, 2)
    device = replace(A100, tiles=(only,))
    found = best_gemm(8192, 4096, 4096, device, 2)
    assert found is not None and found[0] == only
    for op in OPS:
        for estimate in explain_config(op, Problem(512, 512, 512, 8), device).estimates:
            assert estimate.config in (only, None)


@by_device
@pytest.mark.parametrize("op", OPS)
def test_the_explanation_is_a_table_of_every_strategy(op, device):
    explanation = explain_config(op, Problem(8192, 4096, 4096, 16, dropout=True), device)
    text = str(explanation)
    assert device.name in text and "modelled, not measured" in text and "dropout" in text
    lines = text.splitlines()[2:]
    assert [line.lstrip(" *").split()[0] for line in lines] == list(STRATEGIES)
    assert [line[1] == "*" for line in lines].count(True) == 1
    assert explanation.chosen.seconds == min(e.seconds for e in explanation.estimates)


def test_the_explanation_says_why_a_strategy_is_refused():
    problem = Problem(512, 512, 512, MAX_SINGLE_PASS_RANK + 1)
    text = str(explain_config("lora_linear_fwd", problem, A100))
    assert f"takes ranks up to {MAX_SINGLE_PASS_RANK}" in text


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="lora_linear_sideways"):
        explain_config("lora_linear_sideways", Problem(1, 1, 1, 1), A100)


def test_an_unknown_strategy_is_named_and_changes_nothing():
    before = choose("lora_linear_fwd", Problem(512, 512, 512, 8), A100)
    wrong = use_strategy("fastest")
    with pytest.raises(ValueError, match=r"strategy: got 'fastest', expected one of"):
        wrong.__enter__()
    assert choose("lora_linear_fwd", Problem(512, 512, 512, 8), A100) == before


@pytest.mark.parametrize("op", OPS)
def test_a_forced_strategy_runs_until_the_block_ends(op):
    problem = Problem(8192, 4096, 4096, 16)
    automatic = choose(op, problem, A100)
    for strategy in STRATEGIES:
        with use_strategy(strategy):
            assert choose(op, problem, A100).strategy == strategy
            with use_strategy(None):
                assert choose(op, problem, A100) == automatic
    assert choose(op, problem, A100) == automatic


def test_where_the_forced_strategy_cannot_the_cheapest_runs():
    problem = Problem(512, 512, 512, 200)
    with use_strategy("single_pass"):
        assert choose("lora_linear_fwd", problem, A100).strategy != "single_pass"


def test_a_device_that_torch_calls_a_cpu_takes_the_generic_row():
    assert device_of(torch.device("cpu")) == GENERIC


def test_an_unknown_gpu_takes_the_generic_row_with_its_own_sizes(monkeypatch):
    class Properties:
        name = "Imaginary GPU 9000"
        multi_processor_count = 7
        shared_memory_per_block_optin = 65536

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    device_of.cache_clear()
    try:
        device = device_of(torch.device("cuda", 0))
    finally:
        device_of.cache_clear()
    expected = {"name": Properties.name, "multiprocessors": 7, "shared_bytes": 65536}
    expected |= {"gpu": Properties.name}
    assert device == replace(GENERIC, **expected)
    assert choose("lora_linear_fwd", Problem(64, 64, 64, 8), device).refusal is None


# --- what must hold whatever the numbers are ------------------------------------------------------


@by_device
@pytest.mark.parametrize("op", OPS)
def test_dropout_moves_no_bytes(op, device):
    """The mask is made again, never stored: with the tile unchanged the traffic is the same."""
    device = replace(device, tiles=(GemmConfig(64, 64, 64, 4, 3),))
    for m, n, k in SIZES:
        plain, dropped = (
            explain_config(op, Problem(m, n, k, 16, dropout=d), device).estimates
            for d in (False, True)
        )
        for before, after in zip(plain, dropped, strict=True):
            assert after.dram_bytes == before.dram_bytes, after.strategy
            assert after.launches == before.launches
            assert after.seconds >= before.seconds


@by_device
@pytest.mark.parametrize("op", OPS)
def test_more_work_takes_no_less_time(op, device):
    device = replace(device, tiles=(GemmConfig(64, 64, 64, 4, 3),))
    for strategy in range(len(STRATEGIES)):
        seconds = [
            explain_config(op, Problem(m, 1024, 1024, 16), device).estimates[strategy].seconds
            for m in (64, 512, 4096, 32768)
        ]
        assert seconds == sorted(seconds)


@by_device
def test_single_pass_reads_x_once(device):
    """Its DRAM bytes are the operands', and no other strategy's are fewer."""
    m, n, k, r = 8192, 4096, 4096, 16
    single, epilogue, addmm = explain_config(
        "lora_linear_fwd", Problem(m, n, k, r), device
    ).estimates
    assert single.dram_bytes == 2 * (m * k + n * k + m * n + m * r + r * (n + k))
    assert single.dram_bytes < epilogue.dram_bytes < addmm.dram_bytes


@by_device
def test_blocks_of_rows_fit_shared_memory(device):
    for m, block_r, size in itertools.product((1, 64, 100, 1024, 8192), (16, 32, 64), (2, 4)):
        found = shrink_config(m, 4096, device, block_r, size)
        assert found.shared_bytes(size, block_r) <= device.shared_bytes, (m, block_r, size)


@by_device
@pytest.mark.parametrize("block_r", [16, 64])
def test_parts_of_a_sum_cover_it_once(device, block_r):
    for m, k in ((1, 4096), (16, 1024), (8192, 4096), (33, 31)):
        for config, total in (
            (shrink_config(m, k, device, block_r), k),
            (wgrad_config(m, k, device, block_r), m),
        ):
            per_split = split_size(total, config.split_k, config.step)
            assert per_split % config.step == 0
            assert per_split * config.split_k >= total


def test_four_warps_by_pointers_leave_room_on_hopper() -> None:
    """128 x 64 x 32 with 64 ranks had values on the stack there."""
    four, eight = GemmConfig(128, 64, 32, 4, 4), GemmConfig(128, 64, 32, 8, 4)
    assert not is_valid(four, H100, 2, block_r=64)
    assert is_valid(four, A100, 2, block_r=64) and is_valid(four, H100, 2, block_r=32)
    assert is_valid(eight, H100, 2, block_r=64)
