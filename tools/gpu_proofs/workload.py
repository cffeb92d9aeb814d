"""A call whose traffic `bench traffic` counts: its arguments, the bytes it cannot avoid, the FLOPs
it needs, and what it should give in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from tools.gpu_proofs.baselines import Sizes

Shape = tuple[int, int, int, int]
Fill = Callable[..., Tensor]  # torch.empty: only what launches depend on is made
BF16 = torch.bfloat16


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
        dense: where W is 4-bit, the call with W decoded, which fp64 is asked about.
    """

    name: str
    op: str
    args: list[Any]
    sizes: Sizes
    dropout: float
    floor: int
    flops: int
    outputs: int
    strategies: tuple[str | None, ...] = (None,)
    dense: tuple[str, list[Any]] | None = None

    def run(self) -> dict[str, Tensor]:
        """The op by the backend in force."""
        return call(self.op, self.args)

    def exact(self) -> dict[str, Tensor]:
        """The same in fp64 from the same numbers."""
        op, args = self.dense or (self.op, self.args)
        with use_backend("reference"):
            return call(op, in_fp64(args))


def call(op: str, args: list[Any]) -> dict[str, Tensor]:
    """An op's outputs by their names in the schema, those of a list numbered, and what it wrote to
    copies of its arguments."""
    function = getattr(torch.ops.lora_kernels, op).default
    arguments, returns = function._schema.arguments, function._schema.returns
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    args = [a.clone() if i in written else a for i, a in enumerate(args)]
    made = function(*args)
    found = {arguments[i].name: args[i] for i in written}
    values = [made] if len(returns) == 1 else made or ()
    for returned, value in zip(returns, values, strict=True):
        name = returned.name or "y"
        if isinstance(value, Tensor):
            found[name] = value
        else:
            found |= {f"{name}{i}": v for i, v in enumerate(value)}
    return found


def in_fp64(value: Any) -> Any:
    """The same in fp64, but for a 4-bit weight's scales: what it decodes to is a matter of fp32."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], Tensor) and value[0].dtype == torch.uint8:
        return value
    return [in_fp64(v) for v in value]


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def quantised(n: int, k: int, nested: bool, fill: Fill) -> NF4Weight:
    with use_backend("reference"):
        return NF4Weight.quantize(fill(n, k, dtype=BF16), 64, nested)
