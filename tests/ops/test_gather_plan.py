"""What the cost model says of many adapters on a GPU, and what keeps a way from being taken."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lora_kernels.ops.common.configs import DEVICES
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.fused_epilogue import (
    BASES,
    explain_base,
    fused_config,
    use_base,
)
from lora_kernels.ops.gather.triton.plan import (
    SCHEDULES,
    GatherProblem,
    capacity,
    explain_gather,
    plan,
    use_schedule,
)

DECODE = GatherProblem(entries=32, slots=32, ranks=16, n=4096, k=4096)
QUANTISED = Problem(32, 4096, 4096, 0, quantised=True)
DENSE = Problem(32, 4096, 4096, 0)
devices = pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)


@devices
def test_every_way_is_explained_and_can_be_forced(device):
    said = explain_gather(DECODE, device)
    assert [e.strategy for e in said.estimates] == list(SCHEDULES) and said.chosen in said.estimates
    assert all(way in str(said) for way in SCHEDULES) and "modelled, not measured" in str(said)
    for way in SCHEDULES:
        with use_schedule(way):
            assert plan(DECODE, device).grouped == (way == "grouped")


@devices
def test_a_4_bit_base_may_add_the_adapters_itself(device):
    said = explain_base(DECODE, QUANTISED, device)
    assert [e.strategy for e in said.estimates] == list(BASES) and said.chosen in said.estimates
    fused, composed = said.estimates
    assert fused.refusal is None and fused.launches < composed.launches
    # The product's own tile, for the bits of a row without an adapter.
    assert fused.config == composed.config
    with use_base("fused"):
        assert fused_config(DECODE, QUANTISED, device) == fused.config
    with use_base("composed"):
        assert fused_config(DECODE, QUANTISED, device) is None


@devices
def test_a_dense_base_is_torchs_own_product_unless_asked(device):
    assert "for its bits" in explain_base(DECODE, DENSE, device).estimates[0].refusal
    assert fused_config(DECODE, DENSE, device) is None
    with use_base("fused"):
        assert fused_config(DECODE, DENSE, device) is not None


@pytest.mark.parametrize(("tokens", "slots"), [(512, 1000), (4096, 4), (64, 64), (1, 1000)])
def test_few_programs_find_no_work(tokens, slots):
    """However many adapters are loaded, and whatever the mix."""
    entries = Entries([torch.zeros(tokens, dtype=torch.int32)], tokens, slots)
    for across in (1, 16):
        blocks = across * entries.programs(64, across)
        assert blocks <= across * -(-tokens // 64) + 128 + across
    # No mix makes more chunks than there is room for.
    assert min(tokens, slots + 1) <= capacity(tokens, slots, 64) <= tokens


def test_a_mixture_is_composed():
    mixture = GatherProblem(64, 32, 16, 4096, 4096, torch.bfloat16, mixture=True)
    with use_base("fused"):
        assert fused_config(mixture, QUANTISED, DEVICES[0]) is None


@pytest.mark.parametrize("use", [use_schedule, use_base])
def test_an_unknown_way_is_refused(use):
    with pytest.raises(ValueError, match="got 'other', expected one of"), use("other"):
        pass
