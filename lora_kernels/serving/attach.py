"""Putting a pool on a model's layers, and taking it off again."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import get_module, named_modules, replace_module, unwrap
from lora_kernels.ops.common.kinds import describe
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.serving.routing import active_route
from lora_kernels.serving.spec import find_modules

_INPUTS = ("input_ids", "inputs_embeds")


class _RecordTokens:
    """A hook before the model's forward. It notes how many tokens each row of the input has."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = active_route(self.pool)
        if route is None or route.slots is None:
            return
        named = (kwargs.get(name) for name in _INPUTS)
        given = (t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor))
        # Token ids are [B, T], embeddings [B, T, K].
        shapes = (t.shape for t in given if t.dim() >= (3 if t.is_floating_point() else 2))
        shape = next(shapes, None)
        route.tokens = None if shape is None else (shape[0], shape[1])


def attach_pool(model: nn.Module, pool: AdapterPool) -> tuple[str, ...]:
    """Put a `MultiLoRALinear` around each of the model's layers that the pool has pages for.

    Outside `pool.route(...)` the model computes what it did before. Everything is checked before
    anything is changed.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a layer is not there, cannot be adapted, has another shape or is on another
            device than the pool, or the model has adapters or a pool already.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4, target_modules=["q_proj"])
        >>> lk.serving.attach_pool(model, pool)
        ('model.layers.0.self_attn.q_proj',)
        >>> with pool.route([None, None]):  # an adapter's name, or None, for each row
        ...     logits = model(torch.tensor([[1, 2], [3, 4]])).logits
    """
    model = unwrap(model)
    if not hasattr(pool, "spec"):
        raise TypeError(f"pool: got {describe(pool)}, expected an AdapterPool")
    check_model(model)
    names = list(pool.modules)
    exactly = "|".join(re.escape(name) for name in names)
    config = LoRAConfig(target_modules=exactly, exclude_modules=())
    embeddings, linears = find_modules(model, config)
    found = {*embeddings, *linears}
    absent = [name for name in names if name not in found]
    if absent:
        raise ValueError(f"model: has no layer {absent[0]!r}, for which the pool has pages")
    _check_called(model, names)
    layers: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name in names:
        base = get_module(model, name)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), pool.device)
        if device != pool.device:
            raise ValueError(f"{name}: is on {device}, the pool's pages are on {pool.device}")
        if (name in embeddings) != (name in pool.spec.embeddings):
            raise ValueError(
                f"{name}: is a {type(base).__name__}, the pool's pages are not for one"
            )
        layers[name] = base, kind_of(base).to_pooled(base, pool, name)
    for base, layer in layers.values():
        replace_module(model, base, layer)
    model.register_forward_pre_hook(_RecordTokens(pool), with_kwargs=True)
    return tuple(layers)


def _check_called(model: nn.Module, names: list[str]) -> None:
    """Raise ValueError where torch's encoder layer computes with a weight of one of the layers
    without calling the layer."""
    layers = {id(get_module(model, name)) for name in names}
    for owner in model.modules():
        if isinstance(owner, nn.TransformerEncoderLayer) and any(
            id(module) in layers for module in owner.modules()
        ):
            raise ValueError(
                "model: its nn.TransformerEncoderLayer reads its layers' weights without calling "
                "them, so no adapter would be seen"
            )


def detach_pool(model: nn.Module) -> tuple[str, ...]:
    """Put the layers back that `attach_pool` wrapped.

    Returns:
        The names of the layers; none for a model without a pool.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4, target_modules=["q_proj"])
        >>> names = lk.serving.attach_pool(model, pool)
        >>> lk.serving.detach_pool(model) == names
        True
    """
    model = unwrap(model)
    wrapped = [(name, module) for name, module in named_modules(model) if kind_of(module).pooled]
    for _, layer in wrapped:
        replace_module(model, layer, kind_of(layer).base_layer(layer))
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _RecordTokens):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    return tuple(name for name, _ in wrapped)


def attached_pool(model: nn.Module) -> AdapterPool:
    """The pool of a model; ValueError where there is none.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4)
        >>> names = lk.serving.attach_pool(model, pool)
        >>> lk.serving.attached_pool(model) is pool
        True
    """
    for _, module in named_modules(model):
        if kind_of(module).pooled:
            return module.router  # type: ignore[return-value]
    raise ValueError(f"model: {type(model).__name__} has no pool; call attach_pool first")
