"""Where a call runs: on a stream that is not the default one, on a device that is not current, in
another thread."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Thread

import pytest
import torch

from lora_kernels import functional as F
from tests.device.calls import CALLS, TINY, low, make
from tests.ops.variants import bits

SECOND = pytest.param(
    "cuda:1",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            torch.cuda.device_count() < 2,
            reason=f"needs two CUDA devices: torch.cuda.device_count() is "
            f"{torch.cuda.device_count()}",
        ),
    ],
)


def _equal(found, expected) -> None:
    for key, t in expected.items():
        assert found[key].device == t.device
        assert torch.equal(bits(found[key]), bits(t)), key


@pytest.mark.parametrize("name", CALLS)
def test_on_a_side_stream(name, device):
    """Behind other work of that stream, which the call must not overtake, while the default stream
    is busy, which it must not wait for."""
    call = make(name, TINY, device, low(device), 0.25)
    expected = call.results(None)
    values = {key: t.clone() for key, t in call.tensors.items()}
    stream = None if device == "cpu" else torch.cuda.Stream()
    if stream is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream) if stream else nullcontext():
        with torch.no_grad():
            for t in call.tensors.values():
                t.fill_(float("nan"))
            if stream is not None:
                torch.cuda._sleep(20_000_000)  # about 10 ms
            for key, t in call.tensors.items():
                t.copy_(values[key])
        found = call.results(None)
    if stream is not None:
        stream.synchronize()
    _equal(found, expected)


@pytest.mark.parametrize("place", ["cpu", SECOND])
@pytest.mark.parametrize("name", CALLS)
def test_while_another_device_is_current(name, place):
    call = make(name, TINY, place, low(place), 0.25)
    current = torch.cuda.current_device() if place != "cpu" else None
    found = call.check(None)
    assert {t.device for t in found.values()} == {torch.device(place)}
    if current is not None:
        assert torch.cuda.current_device() == current
        with torch.cuda.device(place):
            _equal(found, call.results(None))


@pytest.mark.parametrize("name", CALLS)
def test_in_another_thread(name, device):
    """Where no call has set a device up yet."""
    call = make(name, TINY, device, low(device), 0.25)
    expected, found = call.results(None), {}
    thread = Thread(target=lambda: found.update(call.results(None)))
    thread.start()
    thread.join()
    _equal(found, expected)


def test_arguments_on_two_devices_are_refused(device):
    call = make("lora_linear", TINY, device)
    x, w, a, b, _ = call.tensors.values()
    with pytest.raises(ValueError, match="lora_a"):
        F.lora_linear(x, w, a.to("meta"), b)
