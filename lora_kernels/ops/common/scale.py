"""How an adapter's scale is passed to an op: as a number, or as a tensor in a graph that serves
every scale.

torch.compile at first treats a float as a constant. If the value differs at a second call, it makes
a symbol of it, which it cannot pass to an op: it would compile again for each value. So the symbol
becomes a tensor [] on the CPU here. A constant does not, because a graph with a tensor on the CPU
cannot become a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import BY_TENSOR, run

Scale = float | Tensor


def as_scale(scale: float) -> Any:
    """A scale as an op takes it."""
    if torch.compiler.is_compiling() and not _is_constant(scale):
        return _tensor(scale)
    return float(scale * 1.0)  # text is no number


def as_scales(scales: Sequence[float]) -> list[Any]:
    """Scales as an op takes them: all of them numbers, or all tensors."""
    if torch.compiler.is_compiling() and not all(_is_constant(s) for s in scales):
        return [_tensor(s) for s in scales]
    return [float(s * 1.0) for s in scales]


def run_scaled(name: str, call: Any) -> Any:
    """`registry.run` of a call whose scale, or scales, are as `as_scale` made them."""
    scale = call.scales[0] if hasattr(call, "scales") else call.scale
    if type(scale) is float:
        return run(name, call)
    return getattr(torch.ops.lora_kernels, name + BY_TENSOR)(*call)


def _is_constant(scale: float) -> bool:
    """Whether a graph may treat a scale as a constant: it may not if it is a symbol."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(scale > 0.0) or statically_known_true(scale <= 0.0)


def _tensor(scale: float) -> Tensor:
    # A sum, because torch turns the symbols in it into tensors. No other way works in torch 2.10.
    return torch.zeros((), dtype=torch.float64) + scale
