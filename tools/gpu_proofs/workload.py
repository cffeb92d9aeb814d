"""A call whose traffic `bench traffic` counts: its arguments, the bytes it cannot avoid, the FLOPs
it needs, and what it should give in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_kernels import use_backend
from tools.gpu_proofs.baselines import Sizes
from tools.op_inputs.calls import call, oracle_args


@dataclass(frozen=True)
class Workload:
    """A call to count.

    Attributes:
        name: for the table; plain "forward" and "backward" are those of one LoRA layer.
        op: its name in the schema, and its arguments.
        floor: bytes of each input once and each output once; s counts as neither.
        flops: of the products, at the true rank.
        outputs: numbers that it makes.
        strategies: the ways to run it; None where there is one way.
    """

    name: str
    op: str
    args: Sequence[Any]
    sizes: Sizes
    dropout: float
    floor: int
    flops: int
    outputs: int
    strategies: tuple[str | None, ...] = (None,)

    def run(self) -> dict[str, Tensor]:
        """The op by the backend in force."""
        return call(self.op, self.args)

    def exact(self) -> dict[str, Tensor]:
        """The same in fp64 from the same numbers; what a 4-bit W decodes to is its format's."""
        decodes = self.op == "nf4_dequantize"
        with use_backend("reference"):
            return call(self.op, self.args if decodes else oracle_args(self.op, self.args))


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)
