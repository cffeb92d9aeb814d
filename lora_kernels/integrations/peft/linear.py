"""PEFT's LoRA layers over a dense weight, with a forward on this package's kernels.

Each class adds a forward to the class of PEFT whose name it bears and changes nothing else: the
state, the state dict and every method stay PEFT's. A call that the kernels do not take goes on to
PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lora_kernels import functional
from lora_kernels.integrations.peft.mixed import mixed_forward
from lora_kernels.integrations.peft.state import (
    Base,
    Branch,
    active_branches,
    base_for,
    plain,
    refuse_base,
    refuse_tensor,
    together,
    watched,
    widened,
)
from lora_kernels.ops.nf4.weight import NF4Weight

_CONV1D_FORWARD = Conv1D.forward


class Accelerated:
    """What the accelerated classes share; each comes before its class of PEFT in the order of
    methods."""

    peft_class: type[nn.Module]

    def read_base(self) -> Base | str:
        """The layer under the adapters, or why it has to be called as it is."""
        raise NotImplementedError

    def refuse(self) -> str | None:
        """Why the layer runs on PEFT's code as it stands; None if it does not."""
        layer: Any = self
        base = self.read_base()
        if isinstance(base, str):
            return base
        branches = active_branches(layer)
        return branches if isinstance(branches, str) else refuse_base(base, branches)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward: of the active adapters, or with `adapter_names` of each row's own."""
        layer: Any = self
        y = None
        if not args and not _has_any_global_hook():
            if not kwargs:
                y = _forward(layer, x)
            elif len(kwargs) == 1 and "adapter_names" in kwargs:
                layer._check_forward_args(x, **kwargs)
                y = _mixed(layer, x, kwargs["adapter_names"])
        return super().forward(x, *args, **kwargs) if y is None else y  # type: ignore[misc]

    def extra_repr(self) -> str:
        return "accelerated"


def _forward(layer: Any, x: Tensor) -> Tensor | None:
    """y of the active adapters; None if PEFT has to compute it."""
    own = layer.__dict__
    if own["_disable_adapters"] or own["merged_adapters"]:
        return layer.without_adapters(x)
    base = base_for(layer, x)
    if base is None:
        return None
    branches = active_branches(layer)
    if isinstance(branches, str) or refuse_base(base, branches):
        return None
    if not branches:
        return layer.without_adapters(x)
    branch = together(branches)
    if branch.a.dtype != x.dtype and not own["cast_input_dtype_enabled"]:
        return None  # PEFT raises an error where the dtypes differ
    return run(x, base, branch)


def _mixed(layer: Any, x: Tensor, names: Sequence[str]) -> Tensor | None:
    """y of the rows' own adapters; None if PEFT has to compute it."""
    if layer._disable_adapters:
        return layer.without_adapters(x)
    base = base_for(layer, x)
    return None if base is None else mixed_forward(layer, x, base, names)


def run(x: Tensor, base: Base, branch: Branch) -> Tensor:
    """y of one adapter. It has x's dtype, over a dense base under autocast that of autocast."""
    given = x.dtype
    x, bias = widened(x, base)
    if branch.bias is not None:
        extra = branch.bias * branch.scale
        bias = (extra if bias is None else bias + extra).to(x.dtype)
    four_bit = isinstance(base.weight, NF4Weight)
    if branch.magnitude is not None:
        y = functional.dora_linear(
            *(x, base.weight, branch.a, branch.b, branch.magnitude),
            scale=branch.scale,
            bias=bias,
            dropout_p=branch.p,
        )
    else:
        linear: Any = functional.nf4_lora_linear if four_bit else functional.lora_linear
        y = linear(
            *(x, base.weight, branch.a, branch.b),
            scale=branch.scale,
            bias=bias,
            dropout_p=branch.p,
            rank_diag=branch.diag,
        )
    return y.to(given) if four_bit else y


def dense_base(base: Any) -> Base | str:
    """The weight [N, K] and the bias of an nn.Linear, or of transformers' Conv1D, whose weight is
    the transposed one; or why it has to be called as it is."""
    kind = type(base)
    forward = kind.forward
    if forward is not nn.Linear.forward and forward is not _CONV1D_FORWARD:
        return f"the base layer is a {kind.__name__}, which has a forward of its own"
    if watched(base):
        return "a hook or a forward of its own is set on the base layer"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if not plain(weight):
        return str(refuse_tensor("the base weight", weight))
    if bias is not None and not plain(bias):
        return str(refuse_tensor("the base layer's bias", bias))
    return Base(weight if forward is nn.Linear.forward else weight.T, bias)


class Linear(Accelerated, lora.Linear):
    """`peft.tuners.lora.Linear` over an nn.Linear or a Conv1D, on this package's kernels."""

    peft_class = lora.Linear

    def read_base(self) -> Base | str:
        return dense_base(self._modules["base_layer"])

    def without_adapters(self, x: Tensor) -> Tensor | None:
        """The base alone is torch's own product."""
        return None
