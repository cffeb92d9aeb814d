"""What a LoRA layer of PEFT holds at this moment, as arguments of this package's functions; or why
the layer has to run on PEFT's own code.

PEFT lets its users change a layer at any time: adapters come and go, scales and dropout are set,
hooks are registered, classes replaced. So it is read at each call, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels.ops.common.checks import names
from lora_kernels.ops.nf4.weight import NF4Weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, Parameter)
# The variants of PEFT that have a way here; any other has a forward of its own.
_DORA, _KASA = "DoraLinearVariant", "KasaLinearVariant"
_SAME_FORWARD = ("MiCALinearVariant",)  # LoRA, of which only A is trained


class Base(NamedTuple):
    """The layer under the adapters.

    Attributes:
        weight: W [N, K], dense or 4-bit.
        bias: [N] or None.
        dtype: what the base computes in, where it is wider than its input; None: the input's.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None
    dtype: torch.dtype | None = None


class Branch(NamedTuple):
    """One adapter.

    Attributes:
        a, b: A [r, K] and B [N, r].
        scale: PEFT's scaling.
        p: the probability of dropout, 0 outside training.
        bias: of B (`lora_bias`), [N] or None.
        diag: KaSA's diagonal [r] between A and B, or None.
        magnitude: DoRA's [N], or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    p: float
    bias: Tensor | None = None
    diag: Tensor | None = None
    magnitude: Tensor | None = None


def watched(module: nn.Module) -> bool:
    """Whether a hook, or a forward set on the instance, would be left out if `module` was read and
    not called."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def plain(t: Any) -> bool:
    """Whether a tensor is whole and torch's own, in a dtype that the kernels take."""
    return type(t) in _PLAIN and t.dtype in DTYPES


def refuse_tensor(what: str, t: Any) -> str | None:
    """Why a tensor is not `plain`."""
    if type(t) not in _PLAIN:
        return f"{what} is a {type(t).__name__}, not a plain tensor"
    return None if t.dtype in DTYPES else f"{what} is in {names([t.dtype])}, without a kernel"


def base_for(layer: Any, x: Tensor) -> Base | None:
    """The layer's base if it takes this x; None leaves the call to PEFT, and any error with it."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return None
    base = layer.read_base()
    if isinstance(base, str):
        return None
    weight = base.weight
    if x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return base if x.is_floating_point() and x.dtype != torch.float64 else None
    if isinstance(weight, NF4Weight):
        return base if plain(x) else None
    return base if x.dtype == weight.dtype else None


def widened(x: Tensor, base: Base) -> tuple[Tensor, Tensor | None]:
    """x and the bias in the dtype that the base computes in."""
    if base.dtype is not None and base.dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, base.dtype))
    bias = base.bias
    return x, bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def read_branch(layer: Any, adapter: str) -> Branch | str:
    """The adapter of this name on a linear layer, or why it needs PEFT's own code."""
    modules = layer._modules
    a = modules["lora_A"]._modules[adapter]
    b = modules["lora_B"]._modules[adapter]
    drop = modules["lora_dropout"]._modules[adapter]
    variant = layer.lora_variant.get(adapter)
    if variant is not None and (reason := _refuse_variant(layer, adapter, variant)):
        return reason
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"its factors are {type(a).__name__} and {type(b).__name__}, not nn.Linear"
    if watched(a) or watched(b) or watched(drop):
        return "a hook or a forward of its own is set on lora_A, lora_B or lora_dropout"
    wa: Any = a._parameters["weight"]
    wb: Any = b._parameters["weight"]
    if not (plain(wa) and plain(wb)):
        return refuse_tensor("lora_A", wa) or str(refuse_tensor("lora_B", wb))
    scale = layer.scaling[adapter]
    if type(scale) is not float:
        scale = _as_float(scale)
        if scale is None:
            return "its scaling is a tensor (prepare_model_for_compiled_hotswap)"
    p = 0.0
    if type(drop) is nn.Dropout:
        p = float(drop.p) if drop.training else 0.0
        if p >= 1.0:
            return f"it drops everything (lora_dropout={p:g})"
    elif type(drop) is not nn.Identity:
        return f"its dropout is a {type(drop).__name__}"
    bias = b._parameters["bias"]
    if variant is None:
        return Branch(wa, wb, scale, p, bias)
    kind = type(variant).__name__
    if kind == _DORA:
        magnitude = modules["lora_magnitude_vector"]._modules[adapter]
        if watched(magnitude):
            return "a hook is set on lora_magnitude_vector"
        p = p if layer.training else 0.0
        return Branch(wa, wb, scale, p, bias, None, magnitude._parameters["weight"])
    diag = layer.lora_diag[adapter] if kind == _KASA else None
    return Branch(wa, wb, scale, p, bias, diag)


def _refuse_variant(layer: Any, adapter: str, variant: Any) -> str | None:
    kind = type(variant).__name__
    if kind == _DORA:
        moves = "DoRA with ephemeral_gpu_offload moves its weights at each call"
        return moves if layer.ephemeral_gpu_offload else None
    if kind == _KASA:
        waits = adapter in getattr(layer, "_lora_kasa_truncation_deferred", ())
        return "KaSA has not cut the base weight yet: its first call does" if waits else None
    return None if kind in _SAME_FORWARD else f"{kind} has a forward of its own"


def _as_float(scale: Any) -> float | None:
    """A scale that was set by hand, or made a tensor on the CPU outside a compiled graph."""
    if isinstance(scale, Tensor):
        apart = torch.compiler.is_compiling() or not scale.is_cpu or scale.requires_grad
        return None if apart or scale.numel() != 1 else float(scale)
    return float(scale)


def active_branches(layer: Any) -> list[Branch] | str:
    """The active adapters that are on this layer, or why they need PEFT's own code."""
    here = layer._modules["lora_A"]._modules
    active = layer._active_adapter
    found: list[Branch] = []
    for name in (active,) if isinstance(active, str) else active:
        if name in here:
            branch = read_branch(layer, name)
            if isinstance(branch, str):
                return branch
            found.append(branch)
    return refuse_together(found) or found if len(found) > 1 else found


def refuse_together(branches: Sequence[Branch]) -> str | None:
    """Why several adapters cannot run as one of their ranks together."""
    if any(b.magnitude is not None for b in branches):
        return "several adapters are active, and DoRA scales what the ones before it made"
    if any(b.p for b in branches):
        return "several adapters are active, and each has a dropout mask of its own"
    return None


def refuse_base(base: Base, branches: Sequence[Branch]) -> str | None:
    """Why these adapters gain nothing over this base."""
    w = base.weight
    if not isinstance(w, Tensor) or w.stride(-1) == 1 or not w.is_cpu:
        return None
    # Over Conv1D's transposed weight LoRA runs on plain PyTorch, a training step of 512 tokens in
    # 1.1 to 1.2 of PEFT's time, and in 0.9 with a copy of the weight; DoRA in 0.7 to 0.8.
    if all(b.magnitude is not None for b in branches):
        return None
    return "its weight is stored transposed, which the CPU's kernels do not take"


def together(branches: Sequence[Branch]) -> Branch:
    """Adapters without dropout as one: their ranks side by side, the scales taken into B."""
    if len(branches) == 1:
        return branches[0]
    dtype = torch.float32 if len({b.a.dtype for b in branches}) > 1 else branches[0].a.dtype
    a = torch.cat([b.a.to(dtype) for b in branches])
    columns, bias = [], None
    for branch in branches:
        factor = branch.scale if branch.diag is None else branch.scale * branch.diag
        columns.append((branch.b * factor).to(dtype))
        if branch.bias is not None:
            own = branch.bias * branch.scale
            bias = own if bias is None else bias + own
    return Branch(a, torch.cat(columns, 1), 1.0, 0.0, bias)
