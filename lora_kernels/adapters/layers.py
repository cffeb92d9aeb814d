"""The linear layers of a model: finding them, naming them, measuring and replacing them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels.nn import LoRALinear, LoRAMixin, NF4Linear
from lora_kernels.nn.common import device_hook
from lora_kernels.nn.linear4bit import is_linear4bit
from lora_kernels.ops.common.kinds import describe

# Where wrappers of torch's keep the module that they stand for: torch.compile, activation
# checkpointing and offloading, the first FSDP.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_is_full_backward_hook", "_backward_pre_hooks"),
)
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    AveragedModel,
)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside wrappers of torch's: a model's names and layers are what they were."""
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {describe(model)}, expected a torch.nn.Module")
        inside = ("module",) if isinstance(model, _WRAPPERS) else _INSIDE
        inner = next((m for part in inside if (m := model._modules.get(part)) is not None), None)
        if inner is None:
            return model
        model = inner


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules, each once, by the names that they have without any wrapper."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for part, child in module._modules.items():
            if child is not None:
                yield from walk(f"{name}.{part}" if name else part, child)

    yield from walk("", model)


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module that `named_modules` gives this name.

    Raises:
        AttributeError: there is none.
    """
    module = unwrap(model)
    for part in name.split(".") if name else ():
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(model).__name__} has no module {name!r}")
        module = unwrap(child)
    return module


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoRAMixin]]:
    """(name, layer) of every layer of the model that has an adapter.

    Examples:
        >>> report = lk.apply_lora(model, r=8, target_modules=["q_proj"])
        >>> [(name, layer.r) for name, layer in lk.adapters.adapter_layers(model)]
        [('model.layers.0.self_attn.q_proj', 8)]
    """
    for name, module in named_modules(model):
        if isinstance(module, LoRAMixin):
            yield name, module


def require_adapters(model: nn.Module) -> list[tuple[str, LoRAMixin]]:
    """The adapter layers; ValueError when there are none."""
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no adapters; call apply_lora first")
    return layers


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`: one layer may stand in several places.

    Hooks on `old` go over to `new`, unless `new` holds `old` and calls it.
    """
    if all(module is not old for module in new.modules()):
        _move_hooks(old, new)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                setattr(parent, name, new)


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in _HOOKS:
        if vars(old).get(name):
            setattr(new, name, vars(old)[name])  # the same mapping: handles still remove
    hook = device_hook(old)
    if hook is not None and device_hook(new) is None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def base_format(module: nn.Module) -> str:
    """How a layer of this package stores its base weight, in a word or two."""
    if isinstance(module, NF4Linear):
        weight = module.weight
        return f"{weight.quant_type}/{weight.block_size}{' nested' if weight.is_nested else ''}"
    if isinstance(module, LoRALinear):
        return str(module.weight.dtype).removeprefix("torch.")
    raise TypeError(f"module: got {type(module).__name__}, expected a layer of this package")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts its elements, a tied one counts once."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.in_features * module.out_features
        elif isinstance(module, nn.Linear) and is_linear4bit(module):
            total += module.in_features * module.out_features - module.weight.numel()
    return trainable, total


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each piece of memory counted once."""
    sizes: dict[object, int] = {}
    for t in _tensors(model):
        storage = t.untyped_storage()
        # Meta tensors have no address; what shares one is the same object.
        key = id(t) if t.is_meta else (t.device, storage.data_ptr())
        sizes[key] = max(sizes.get(key, 0), t.nbytes if t.is_meta else storage.nbytes())
    return sum(sizes.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(module, "quant_state", None) if is_linear4bit(module) else None
        if state is not None:
            values = [state.absmax, getattr(state.state2, "absmax", None)]
            yield from (v for v in values if isinstance(v, torch.Tensor))
