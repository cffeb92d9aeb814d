"""The forward of a layer that is not trained, in a graph that torch.compile makes.

A graph calls every op through torch's dispatcher. To go from there into Python and back to the
kernel takes as long as a token of a small layer. `lora_linear_eval` and `linear_eval` stay in C++
on the CPU. While `use_backend` or `explain` is open in any thread, and for an unusual call,
`lora_linear_eval` goes through `lora_linear_fwd`, which honours them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from lora_kernels.dispatch.registry import define_twin, run
from lora_kernels.ops.common import flops
from lora_kernels.ops.common.flatten import from_rows, to_rows
from lora_kernels.ops.common.native import DTYPES, refuse_device
from lora_kernels.ops.lora.schema import LoRALinearForward

ROWS = 8  # up to which a plain layer may be faster than torch's; csrc has the exact rule


class _LoRALinear(NamedTuple):
    x: Any
    base: Any
    meta: Sequence[int]
    a: Any
    b: Any
    scale: float
    bias: Any


class _Linear(NamedTuple):
    x: Any
    weight: Any
    bias: Any


def _rows(shape: Sequence[int]) -> int:
    return torch.Size(shape[:-1]).numel()


def _any_backend(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    call = LoRALinearForward(to_rows(x), base, meta, a, b, scale, bias, 0.0, None, None, None)
    y, _ = run("lora_linear_fwd", call)
    return from_rows(y, x)


def _lora_fake(x: Tensor, base: Sequence[Tensor], meta: Sequence[int], *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], meta[0]))


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _lora_flops(c: _LoRALinear) -> int:
    return flops.lora_fwd(_rows(c.x), c.meta[0], c.meta[1], c.a[0])


def _linear_flops(c: _Linear) -> int:
    return 2 * _rows(c.x) * c.weight[0] * c.weight[1]


_ARGUMENTS = (
    "(Tensor x, Tensor[] base, int[] meta, Tensor a, Tensor b, float scale, Tensor? bias) -> Tensor"
)
for _name in ("lora_linear_eval", "lora_linear_any"):  # the second is what the first falls back to
    define_twin(_name, _ARGUMENTS, _any_backend, _lora_fake, _LoRALinear, _lora_flops)
define_twin(
    "linear_eval",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    _linear_fake,
    _Linear,
    _linear_flops,
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _there() -> bool:
    """Whether the extension is."""
    return refuse_device("lora_linear_fwd", torch.device("cpu")) is None


def lora_linear_in_graph(c: LoRALinearForward) -> Tensor | None:
    """y [..., N] of a call outside autograd, without dropout and diagonals; x may have any leading
    dimensions. None outside torch.compile, and where the compiled kernels do not take the
    call."""
    if (
        not torch.compiler.is_compiling()
        or c.x.device.type != "cpu"
        or type(c.scale) is not float
        or not (c.x.dtype in DTYPES and c.a.dtype in DTYPES)
        or forward_ad._current_level >= 0
        or not _there()
    ):
        return None
    op = torch.ops.lora_kernels.lora_linear_eval
    return op(c.x, c.base, c.meta, c.a, c.b, c.scale, c.bias)  # type: ignore[no-any-return]


def linear_in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same for a plain bf16 layer, if the graph knows that the number of rows is small."""
    if (
        not torch.compiler.is_compiling()
        or not (x.dtype is weight.dtype is torch.bfloat16)
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    rows = x.numel() // max(x.shape[-1], 1)
    if not (isinstance(rows, int) and 0 < rows <= ROWS) or not _there():
        return None
    return torch.ops.lora_kernels.linear_eval(x, weight, bias)  # type: ignore[no-any-return]
