"""Every public function and its gradients, in the package's own way of calling them, within the
budget."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import functional as F
from tests.device.calls import CALLS, NO_TRITON, RAGGED, ROUND, TINY, WITH_DROPOUT, low, make
from tests.ops.variants import bits

# Made of these alone, or tested bit for bit elsewhere.
WITHOUT_A_CALL = {
    "Mixture", "RankPages", "SlotDropout", "dropout_mask", "page_adapters",
    "page_embedding_adapters", "weight_norm_squared",
}  # fmt: skip
CASES = [(name, 0.0) for name in CALLS] + [(name, 0.25) for name in WITH_DROPOUT]


def _skip(name: str, backend: str | None) -> None:
    if backend == "triton" and name in NO_TRITON:
        pytest.skip(f"{name} has no Triton kernels")


def _type(name: str, device: str) -> torch.dtype:
    return low(device) if name == "low" else getattr(torch, name)


def test_every_public_function_has_a_call():
    assert set(CALLS) | WITHOUT_A_CALL == set(F.__all__)


@pytest.mark.parametrize("dtype", ["float32", "low"])
@pytest.mark.parametrize(("name", "dropout"), CASES)
def test_within_the_budget(name, dropout, dtype, device, backend):
    _skip(name, backend)
    make(name, TINY, device, _type(dtype, device), dropout).check(backend)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [RAGGED, ROUND], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "dropout"), CASES)
def test_larger_calls_within_the_budget(name, dropout, dtype, sizes):
    make(name, sizes, "cuda", dtype, dropout).check(None)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_every_time(name, device):
    call = make(name, TINY, device, low(device), 0.25)
    first, second = call.results(None), call.results(None)
    for key, t in first.items():
        assert torch.equal(bits(t), bits(second[key])), key


def test_the_same_mask_on_every_device(device):
    seed = torch.tensor([77])
    there = F.dropout_mask((9, 70), 0.3, seed.to(device), 2)
    assert torch.equal(there.cpu(), F.dropout_mask((9, 70), 0.3, seed, 2))
