"""What a block sets holds in its own thread or task, and in the backward that follows from it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels import explain, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch.settings import Setting
from lora_kernels.ops.common.strategies import use_strategy
from tests.ops.public_calls import CALLS, Call


def _backends() -> list[str | None]:
    """What runs an op here and now."""
    gate = torch.ones(2, 4)
    return [e.chosen for e in explain(lambda: F.gated_activation(gate, gate))]


def test_overlapping_blocks_of_two_threads():
    """The first to begin ends before the second: neither sees the other's, and nothing stays."""
    usual = _backends()
    begun, ended = threading.Event(), threading.Event()

    def first():
        with use_backend("reference"):
            begun.wait(30)
            inside = _backends()
        ended.set()
        return inside, _backends()

    def second():
        with use_backend(None):
            begun.set()
            ended.wait(30)
            return _backends()

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        assert one.result() == (["reference"], usual)
        assert two.result() == usual
    assert _backends() == usual


def test_explain_leaves_out_what_another_thread_runs():
    explaining, ran = threading.Event(), threading.Event()

    def other():
        explaining.wait(30)
        F.dropout_mask((2, 3), 0.5, 1)
        ran.set()

    def watched():
        explaining.set()
        ran.wait(30)
        F.gated_activation(torch.ones(1, 2), torch.ones(1, 2))

    thread = threading.Thread(target=other)
    thread.start()
    found = explain(watched)
    thread.join()
    assert [e.op for e in found] == ["glu_fwd"]


def test_tasks_do_not_see_each_other():
    usual = _backends()

    async def forced():
        with use_backend("reference"):
            await asyncio.sleep(0.01)
            return _backends()

    async def free():
        await asyncio.sleep(0)
        return _backends()

    async def both():
        return await asyncio.gather(forced(), free())

    assert asyncio.run(both()) == [["reference"], usual]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_backward_in_another_thread_has_its_forwards_backend(call: Call):
    """As autograd's own threads run it on a GPU."""
    t = call.tensors()
    with use_backend("reference"):
        total = sum(y.sum() for y in call.outputs(t, call.fixed()))

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(explain, total.backward).result()
    assert {e.chosen for e in found} <= {"reference"}
    if call.name != "linear_cross_entropy":  # whose gradients are made in the forward
        assert found


def test_a_setting_ends_with_its_block_after_an_error():
    setting: Setting[int] = Setting("number", 1)
    with pytest.raises(KeyError), setting.use(2):
        assert setting.get() == 2
        raise KeyError
    assert setting.get() == 1
    with pytest.raises(ValueError, match="strategy: got 'fast'"), use_strategy("fast"):
        pass
