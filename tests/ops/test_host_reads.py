"""What a CUDA graph asks of the Triton backend: the host never reads what a kernel wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from lora_kernels.dispatch import ops
from lora_kernels.ops.common.configs import DEVICES
from lora_kernels.ops.common.launch import use_executor
from lora_kernels.ops.common.strategies import STRATEGIES, use_strategy
from tests.ops.case import Case
from tests.ops.grid import grid
from tests.ops.inputs import GENERATORS, cases
from tests.ops.variants import WITH_STRATEGIES, accepts
from tools.gpu_proofs.recorder import Recorder

# Set-up, which looks for values that are not finite before it encodes any.
SET_UP = ("nf4_quantize", "nf4_quantize_scales")
# A value goes to the host, or a size depends on one.
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostReads(TorchDispatchMode):
    """Keeps what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        copied = func.overloadpacket is torch.ops.aten._to_copy and (kwargs or {}).get("device")
        if copied or READS & set(func.tags):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def _calls():
    with use_executor(Recorder()):
        for op in GENERATORS:
            if op in SET_UP or "triton" not in ops()[op].implementations:
                continue
            for case in cases(op):
                args = case.build()
                if case.core and accepts(op, "triton", args):
                    for strategy in STRATEGIES if op in WITH_STRATEGIES else (None,):
                        name, mark = f"{op}-{case.label}-{strategy}", grid(case, args, strategy)
                        yield pytest.param(case, strategy, id=name, marks=mark)


def test_the_mode_sees_a_read():
    with HostReads() as reads:
        bool(torch.ones(1) > 0)
        torch.ones(3)[torch.tensor([True, False, True])]
    assert len(reads.found) == 2, reads.found


@pytest.mark.parametrize("device", [d for d in DEVICES if d.name in ("A100", "H100")], ids=str)
@pytest.mark.parametrize(("case", "strategy"), list(_calls()))
def test_no_result_is_read(case: Case, strategy: str | None, device):
    args = case.build()
    recorder = Recorder(device)
    # Not the op: a mode does not see what happens inside one.
    op = ops()[case.op]
    with use_strategy(strategy), use_executor(recorder), HostReads() as reads:
        op.implementations["triton"].fn(op.call(*args))
    assert not reads.found
