"""PEFT's LoRA layer over a bitsandbytes Linear4bit, whose bytes are read as they are.

bitsandbytes repacks a weight in place, with rounded scales, when a layer in eval mode is called on
a CPU. This forward does not call it, neither with adapters nor without.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from peft.tuners import lora
from torch import Tensor

from lora_kernels import functional
from lora_kernels.integrations.peft.linear import Accelerated
from lora_kernels.integrations.peft.state import Base, base_for, watched, widened
from lora_kernels.nn.linear4bit import is_linear4bit, weight_from_linear4bit
from lora_kernels.ops.nf4.weight import NF4Weight


class _Read(NamedTuple):
    """A weight, and what it was made of. Not the layer's parameter: it may hold the layer."""

    state: Any
    parts: tuple[int, ...]
    weight: NF4Weight


# A layer's weight is taken apart once, for as long as it is made of the same tensors. It shares
# them, so a change of their values needs no notice. Kept beside the layer, not in it: a copy or a
# pickle of the layer has nothing of it.
_READ: weakref.WeakKeyDictionary[Any, _Read] = weakref.WeakKeyDictionary()


def _parts(parameter: Any, state: Any) -> tuple[int, ...]:
    inner = state.state2
    tensors = [parameter, state.absmax, state.code, state.offset]
    tensors += [] if inner is None else [inner.absmax, inner.code]
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def four_bit_weight(base: Any) -> NF4Weight | str:
    """The weight of a Linear4bit, sharing its tensors; or why it has to be called as it is."""
    parameter = base._parameters["weight"]
    state = getattr(parameter, "quant_state", None) or base.quant_state
    if state is None:
        return "the base layer is not quantised yet: bitsandbytes does it when it is moved"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the base weight in place for CPU inference"
    parts = _parts(parameter, state)
    read = _READ.get(base)
    if read is None or read.state is not state or read.parts != parts:
        try:
            read = _Read(state, parts, weight_from_linear4bit(base))
        except (TypeError, ValueError) as error:
            return str(error)
        _READ[base] = read
    return read.weight


class Linear4bit(Accelerated, lora.Linear4bit):
    """`peft.tuners.lora.Linear4bit` on this package's kernels."""

    peft_class = lora.Linear4bit

    def read_base(self) -> Base | str:
        base: Any = self._modules["base_layer"]
        if not is_linear4bit(base) or type(base).__name__ != "Linear4bit":
            return f"the base layer is a {type(base).__name__}, which has a forward of its own"
        if watched(base):
            return "a hook or a forward of its own is set on the base layer"
        weight = four_bit_weight(base)
        if isinstance(weight, str):
            return weight
        return Base(weight, base._parameters["bias"], base.compute_dtype)

    def without_adapters(self, x: Tensor) -> Tensor | None:
        """The base alone, which bitsandbytes would repack."""
        if self.disable_adapters and self.merged:
            return None  # PEFT unmerges first
        base = base_for(self, x)
        if base is None:
            return None
        wide, bias = widened(x, base)
        return functional.nf4_linear(wide, base.weight, bias=bias).to(x.dtype)  # type: ignore[arg-type]
