"""The multi-adapter kernels' compiled PTX, to the bit: a token's result does not depend on its
company, on the way that a batch is cut, or on anything past a rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from lora_kernels.ops.gather.triton.plan import SCHEDULES
from tests.compiled.test_ptx import DEVICES, Way
from tools.gpu_proofs import emulator
from tools.op_inputs import gather
from tools.op_inputs.gather import Gather
from tools.op_inputs.source import Source

pytestmark = pytest.mark.skipif(
    emulator.missing() is not None, reason=emulator.missing() or "the PTX emulator is there"
)

CALL = Gather(t=37, k=600, n=(136,), ranks=(16, 5, 40), padded=True)
OVER = replace(CALL, base="nf4", bias=True)


def _run(cc: int, way: str, out: Tensor, *args: object) -> Tensor:
    out = out.clone()
    runs = Way(cc, DEVICES[cc], way)
    with runs.active():
        torch.ops.lora_kernels.gather_lora_add(out, *args)
    assert not runs.faults()
    return out


@pytest.mark.parametrize("cc", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_way_and_every_company_gives_the_same_bits(cc, dtype):
    out, x, pages, entries, _ = gather.add(replace(CALL, dtype=dtype), Source(7))
    whole = {way: _run(cc, way, out, x, pages, entries, False) for way in SCHEDULES}
    assert torch.equal(whole["per_token"], whole["grouped"])
    nobody = entries[0] < 0
    assert nobody.any() and torch.equal(whole["per_token"][nobody], out[nobody])
    assert not torch.equal(whole["per_token"][~nobody], out[~nobody])
    for t in (0, 17, 36):
        row = slice(t, t + 1)
        for way in SCHEDULES:
            alone = _run(cc, way, out[row], x[row], pages, [entries[0][row]], False)
            assert torch.equal(alone[0], whole[way][t]), (t, way)


@pytest.mark.parametrize("cc", DEVICES)
@pytest.mark.parametrize("way", SCHEDULES)
def test_a_slot_that_is_not_there_is_none(cc, way):
    out, x, pages, entries, _ = gather.add(CALL, Source(8))
    wrong = torch.where(entries[0] == 1, 3, entries[0])
    wrong[wrong == 2] = 2**31 - 1
    made = _run(cc, way, out, x, pages, [wrong], False)
    none = wrong != 0
    assert torch.equal(made[none], out[none])
    assert not torch.equal(made[~none], out[~none])


@pytest.mark.parametrize("cc", DEVICES)
@pytest.mark.parametrize("way", SCHEDULES)
def test_the_launches_of_one_mix_serve_another(cc, way):
    """What a CUDA graph replays: the same launches, on the same memory, with other slots in it."""
    first, x, pages, entries, _ = gather.add(CALL, Source(9))
    mixes = [entries[0], entries[0].flip(0), torch.full_like(entries[0], 2), entries[0] * 0 - 1]
    slots, out = mixes[0].clone(), first.clone()
    runs = Way(cc, DEVICES[cc], way)
    with runs.active():
        torch.ops.lora_kernels.gather_lora_add(out, x, pages, [slots], False)
        captured = [run.launch for run in runs.runs[-1].runs]
        assert torch.equal(out, _run(cc, way, first, x, pages, [mixes[0]], False))
    for mix in mixes[1:]:
        slots.copy_(mix)
        out.copy_(first)
        with runs.active():
            for launch in captured:
                runs.runs[-1].run(launch)
        assert not runs.faults()
        assert torch.equal(out, _run(cc, way, first, x, pages, [mix], False))


@pytest.mark.parametrize("cc", DEVICES)
def test_over_a_4_bit_base_a_row_is_the_same_in_any_company(cc):
    """Where the base's product adds the adapters itself; without one a row is the base alone."""
    x, base, meta, bias, pages, entries, _ = gather.forward(OVER, Source(10))
    runs = Way(cc, DEVICES[cc], "fused")

    def layer(slots: Tensor) -> Tensor:
        with runs.active():
            y, _ = torch.ops.lora_kernels.gather_lora_fwd(x, base, meta, bias, pages, [slots], [])
        assert any(r.launch.kernel.fn.__name__ == "_gather_gemm_kernel" for r in runs.runs[-1].runs)
        assert not runs.faults()
        return y

    mixed = layer(entries[0])
    with runs.active():
        alone = torch.ops.lora_kernels.nf4_linear_fwd(x, base, meta, bias)
    nobody = entries[0] < 0
    assert nobody.any() and torch.equal(mixed[nobody], alone[nobody])
    assert not torch.equal(mixed[~nobody], alone[~nobody])
    pages[0][int(pages[2][0, 0])] = torch.inf  # of slot 0
    for slot in (1, 2):
        own = entries[0] == slot
        assert torch.equal(layer(entries[0])[own], mixed[own])
        assert torch.equal(layer(torch.full_like(entries[0], slot))[own], mixed[own])
