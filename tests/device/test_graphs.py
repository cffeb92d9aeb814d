"""CUDA graphs: every public function, forward and backward, captured once and replayed on other
values. On the CPU the call itself stands for the replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.device.calls import CALLS, RAGGED, TINY, Sizes, capture, low, make
from tests.ops.variants import bits


@pytest.mark.parametrize(
    "sizes", [TINY, pytest.param(RAGGED, marks=[pytest.mark.gpu, pytest.mark.slow])], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "low"])
@pytest.mark.parametrize("name", CALLS)
def test_a_replay_gives_the_bits_of_the_call(name, dtype, sizes, device):
    if device == "cpu" and sizes is not TINY:
        pytest.skip("larger sizes are for a CUDA device")
    call = make(name, sizes, device, low(device) if dtype == "low" else torch.float32, 0.25)
    replay = capture(lambda: call.results(None), device)
    for turn in range(3):
        if turn:
            with torch.no_grad():
                for key, t in call.tensors.items():  # in place: a graph knows addresses
                    if key in call.wanted:
                        t.mul_(-0.5 if turn == 1 else 1.5)
        found = {key: t.clone() for key, t in replay().items()}
        for key, t in call.results(None).items():
            assert torch.equal(bits(found[key]), bits(t)), f"{key} at turn {turn}"


def test_a_replay_draws_another_mask(device):
    from lora_kernels import functional as F

    call = make("lora_linear", Sizes(64, 32, 64, 4), device)
    x, w, a, b, _ = call.tensors.values()

    def run() -> dict[str, Tensor]:
        return {"y": F.lora_linear(x, w, a, b, dropout_p=0.5)}

    replay = capture(run, device)
    first, second = (replay()["y"].clone() for _ in range(2))
    assert not torch.equal(first, second)
