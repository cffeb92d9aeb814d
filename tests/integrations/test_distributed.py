"""Adapters under torch.distributed: two processes over gloo, each with half of the batch.

Every test looks at what the two processes wrote down in one run of `distributed_work.work`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_kernels.adapters import disable_adapters, merge_adapters, save_adapter
from lora_kernels.testing import assert_within_budget
from tests.integrations.distributed_work import (
    ADAPTERS,
    HIDDEN,
    KINDS,
    RANKS,
    adapted,
    adapters,
    attention,
    batch,
    build,
    inputs,
    loss,
    projected,
    work,
)
from tests.nn.layers import plain, plain_args

pytestmark = pytest.mark.slow  # each process imports torch: 7 s


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs a torch with gloo")
    folder: Path = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") | {"folder": str(folder)} for rank in range(RANKS)]


def plain_gradients(dtype: torch.dtype, base_dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the adapters, by the plain expression on the whole batch in one process."""
    model, x = build(dtype=base_dtype), batch(base_dtype).to(dtype)
    leaves = []
    for layer in (model[0], model[2]):
        _, w, a, b, bias, scale = plain_args(layer, x)
        if dtype == torch.float64:
            a, b = a.double(), b.double()
        leaves += [a.requires_grad_(), b.requires_grad_()]
        x = plain(x, w, a, b, bias, scale)
        if layer is model[0]:
            x = x.tanh()
    loss_value = x.square().mean() if dtype == torch.float64 else loss(x)
    return dict(zip(ADAPTERS, torch.autograd.grad(loss_value, leaves), strict=True))


def assert_gradients(actual: dict[str, Tensor], dtype: torch.dtype) -> None:
    oracle, expected = plain_gradients(torch.float64, dtype), plain_gradients(dtype, dtype)
    for name in ADAPTERS:
        assert_within_budget(actual[name], oracle[name], expected[name], name)


def test_ddp_gives_the_gradients_of_the_joined_batch(ranks):
    for found in ranks:
        assert_gradients(found["ddp"]["gradients"], torch.float32)


def test_ddp_sends_no_gradient_of_the_base(ranks):
    for found in ranks:
        assert sorted(found["ddp"]["sent"]) == sorted(ADAPTERS)
        frozen = {n for n, g in found["ddp"]["gradients"].items() if g is None}
        assert frozen == {"0.weight", "0.bias", "2.bias"}


def test_ddp_keeps_the_processes_alike(ranks):
    first, second = (found["ddp"]["trained"] for found in ranks)
    untrained = build().state_dict()
    assert first.keys() == second.keys() == untrained.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, untrained[name]) == (name not in ADAPTERS), name


def test_dropout_follows_each_process_own_seed(ranks):
    first, second = (found["dropout"] for found in ranks)
    assert torch.equal(first["same seed"], second["same seed"])
    assert not torch.equal(first["own seed"], second["own seed"])
    for found in (first, second):
        assert torch.equal(found["own seed"], found["alone"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp_gives_the_gradients_of_the_joined_batch(ranks, dtype):
    for found in ranks:
        assert found["fsdp"][str(dtype)]["rows"] == HIDDEN // RANKS  # of lora_B: really sharded
        assert_gradients(found["fsdp"][str(dtype)]["gradients"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fsdp_trains_and_its_state_comes_back(ranks, dtype):
    untrained = build(dtype=dtype).state_dict()
    for found in (found["fsdp"][str(dtype)] for found in ranks):
        assert found["trained"].keys() == untrained.keys()
        for name, value in found["trained"].items():
            assert torch.equal(value, untrained[name]) == (name not in ADAPTERS), name
        for how, y in found["restored"].items():
            assert torch.equal(y, found["y"]), how


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_projections_that_run_as_one(ranks, way):
    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = attention(fuse=False).to(dtype)
        loss(model(projected().to(dtype))).backward()
        return {n: p.grad for n, p in adapters(model).items()}

    oracle, alone = gradients(torch.float64), gradients(torch.float32)
    for found in (found["fused"][way] for found in ranks):
        assert found["ran"] == ["lora_packed_fwd", "lora_linear_fwd"]
        assert found["gradients"].keys() == oracle.keys()
        for name, grad in found["gradients"].items():
            assert_within_budget(grad, oracle[name], alone[name], name)


@pytest.mark.parametrize("kind", KINDS)
def test_split_adapters_are_saved_loaded_and_merged(ranks, kind):
    """As an unsplit model's: the same files, written once, and the same outputs in each process."""
    torch.set_num_threads(1)  # torch's own products differ with their number
    alone = adapted(**KINDS[kind])
    folder = Path(ranks[0]["folder"])
    save_adapter(alone, folder / "alone" / kind)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        split, whole = (folder / kind / file, folder / "alone" / kind / file)
        assert split.read_bytes() == whole.read_bytes()
    want = alone(inputs()).detach()
    with disable_adapters(alone):
        without = alone(inputs()).detach()
    merge_adapters(alone)
    merged = alone(inputs()).detach()
    for found in (found["saved"][kind]["outputs"] for found in ranks):
        for how in ("split", "with again", "loaded", "unmerged"):
            assert torch.equal(found[how], want), how
        for how in ("without", "off"):
            assert torch.equal(found[how], without), how
        for how in ("merged", "unloaded"):
            assert torch.equal(found[how], merged), how
        assert found["error"] == "NotADirectoryError"  # in the process that writes, and the other
