"""The linear layers of a model: finding them, naming them, measuring and replacing them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.common import device_hook
from lora_kernels.ops.common.kinds import describe

# The attribute in which torch.compile, activation checkpointing and offloading, and the first FSDP
# keep the module that they wrap.
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
    """The module inside torch's wrappers, whose layers have the names that they had before."""
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {describe(model)}, expected a torch.nn.Module")
        inside = ("module",) if isinstance(model, _WRAPPERS) else _INSIDE
        inner = next((m for part in inside if (m := model._modules.get(part)) is not None), None)
        if inner is None:
            return model
        model = inner


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the model's modules, each once, named as without any wrapper."""
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
        if kind_of(module).adapted:
            yield name, cast(LoRAMixin, module)


def require_adapters(model: nn.Module) -> list[tuple[str, LoRAMixin]]:
    """The adapter layers; ValueError when there are none."""
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no adapters; call apply_lora first")
    return layers


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`; one layer may be in several places.

    Hooks on `old` move to `new`, unless `new` holds `old` and calls it.
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
            setattr(new, name, vars(old)[name])  # the same mapping: handles still remove hooks
    hook = device_hook(old)
    if hook is not None and device_hook(new) is None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts its elements, a tied one counts once."""
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    total += sum(kind_of(module).uncounted_elements(module) for module in model.modules())
    return trainable, total


def count_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each piece of memory counted once."""
    sizes: dict[object, int] = {}
    for t in _tensors(model):
        storage = t.untyped_storage()
        # Meta tensors have no address; shared ones are the same object.
        key = id(t) if t.is_meta else (t.device, storage.data_ptr())
        sizes[key] = max(sizes.get(key, 0), t.nbytes if t.is_meta else storage.nbytes())
    return sum(sizes.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from kind_of(module).uncounted_tensors(module)
