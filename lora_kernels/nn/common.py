"""What all the modules need: checks of a plain linear layer, making one, sharded tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels.nn.frozen_linear import ShortForward
from lora_kernels.ops.common.checks import FLOATS, check_finite, names


def check_linear_layer(linear: nn.Module) -> None:
    """Raise unless `linear` computes x·Wᵀ + bias from a plain, whole, floating-point weight."""
    kind = type(linear).__name__
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: got {kind}, expected torch.nn.Linear")
    if type(linear).forward is not nn.Linear.forward:
        raise TypeError(
            f"linear: got {kind}, which has a forward of its own; expected torch.nn.Linear "
            "(a bitsandbytes Linear4bit goes through from_linear4bit)"
        )
    _check_own_forward(linear)
    weight = linear._parameters.get("weight")
    for name, own in (("weight", weight), ("bias", linear._parameters.get("bias"))):
        if own is None and (name == "weight" or linear.bias is not None):
            raise TypeError(
                f"linear: the {name} of this {kind} is computed (parametrised), expected a "
                "parameter"
            )
    assert weight is not None
    if weight.dtype not in FLOATS:
        raise TypeError(
            f"linear.weight: got dtype {names([weight.dtype])}, expected {names(FLOATS)}"
        )
    shape = [linear.out_features, linear.in_features]
    if list(weight.shape) != shape:
        raise ValueError(f"linear.weight: got shape {list(weight.shape)}, expected {shape}")


def _check_own_forward(linear: nn.Linear) -> None:
    """Raise TypeError for a forward set on the instance, except accelerate's that moves inputs."""
    forward = vars(linear).get("forward", linear.forward)
    if isinstance(forward, ShortForward):
        return
    if getattr(forward, "__func__", None) is nn.Linear.forward and forward.__self__ is linear:
        return
    inner = getattr(vars(linear).get("_old_forward"), "__func__", None)
    hook = device_hook(linear)
    if hook is None or inner is not nn.Linear.forward:
        name = getattr(forward, "__qualname__", type(forward).__name__)
        raise TypeError(
            f"linear: its forward is set on the instance ({name}), and a layer in its place would "
            "lose it; expected the class's own"
        )
    if hook.offload:
        raise TypeError(
            "linear: accelerate has offloaded its weight and loads it in a forward of its own, "
            "expected a weight that stays"
        )


def device_hook(module: nn.Module) -> Any:
    """accelerate's hook that moves the inputs to the layer's device; None without one."""
    hook = vars(module).get("_hf_hook")
    return hook if type(hook).__name__ == "AlignDevicesHook" else None


def check_finite_weight(weight: Tensor) -> None:
    """Raise ValueError for values that are not finite in fp32, the dtype for quantising.

    It reads the weight once, and allocates memory only if it raises.
    """
    if weight.numel() > 0:
        extremes = torch.stack(torch.aminmax(weight.detach()))  # both are NaN if any value is
        if not bool(torch.isfinite(extremes.float()).all()):
            check_finite("weight", weight.detach().float())


def check_features(in_features: int, out_features: int) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {value!r}, expected an int")
        if value < 0:
            raise ValueError(f"{name}: got {value}, expected 0 or more")


def whole(t: Any) -> Any:
    """The whole of a tensor that `fully_shard` has split over processes; every process has to call
    this. Any other tensor, and None, is returned as it is."""
    gather = getattr(t, "full_tensor", None)
    return t if gather is None else gather().detach()


def whole_parameter(p: Parameter | None) -> Parameter | None:
    """`whole` of a parameter; the same object if it is not split."""
    gathered = whole(p)
    return p if gathered is p else Parameter(gathered, requires_grad=p.requires_grad)  # type: ignore[union-attr]


@torch.no_grad()
def fill(p: Tensor, values: Tensor) -> None:
    """Copy values into a parameter. If it is split, each process copies its own part."""
    if hasattr(p, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        split: Any = p
        values = values.to(p.device, p.dtype)
        values = distribute_tensor(values, split.device_mesh, split.placements)
    p.copy_(values)


def make_linear(weight: Tensor, bias: Parameter | None, *, training: bool) -> nn.Linear:
    """A frozen nn.Linear around `weight` [N, K] and `bias` [N], neither of them copied."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = whole_parameter(bias)  # type: ignore[assignment]
    return linear.train(training)


def frozen(parameter: Any) -> Any:
    """The same parameter (or None), which no longer requires a gradient."""
    return None if parameter is None else parameter.requires_grad_(False)


def parameter(module: nn.Module, name: str) -> Any:
    """`module.<name>`. `nn.Module.__getattr__` takes longer to find the parameters of a small
    layer than its kernel runs."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def cast_like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """`t` in x's dtype, for layers over a 4-bit base, which compute in x's dtype."""
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {names([x.dtype])}, expected {names(FLOATS)}")
    return t if t is None or t.dtype == x.dtype else t.to(x.dtype)


def set_buffer(module: nn.Module, name: str, t: Tensor | None) -> None:
    """Register a tensor, or None, as a buffer that is not in the state dict.

    accelerate's hooks expect a tensor for every name in the set of such buffers, so a name whose
    buffer is None is taken out of it.
    """
    module.register_buffer(name, t, persistent=False)
    if t is None:
        module._non_persistent_buffers_set.discard(name)


def draw_kaiming(t: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill in place as nn.Linear and LoRA do: Kaiming-uniform with a=√5."""
    if t.numel() > 0:  # torch warns if a tensor is empty
        nn.init.kaiming_uniform_(t, a=math.sqrt(5), generator=generator)


def draw_linear_weight(weight: Tensor, bias: Tensor | None) -> None:
    """Fill in place with nn.Linear's own initial distribution."""
    draw_kaiming(weight)
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
        with torch.no_grad():
            bias.uniform_(-bound, bound)
