"""Which rows use which slots right now, and the layers that ask."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.layers import (
    get_module,
    named_modules,
    replace_module,
    unwrap,
)
from lora_kernels.nn.multi_lora import MultiLoRALinear
from lora_kernels.nn.multi_lora_embedding import POOLED, MultiLoRAEmbedding
from lora_kernels.ops.common.kinds import describe
from lora_kernels.serving.form import find_modules

if TYPE_CHECKING:
    from lora_kernels.serving.pool import AdapterPool

# Of each thread and each asyncio task its own: a route is seen by the code inside it alone.
_Routes = tuple[tuple[object, "_Route"], ...]
_INPUTS = ("input_ids", "inputs_embeds")
_ACTIVE: ContextVar[_Routes] = ContextVar("active routes", default=())


class _Route:
    """The slots of a route, and (batch, tokens) of the last input of a model with the pool."""

    def __init__(self, slots: Tensor | None) -> None:
        self.slots = slots
        self.tokens: tuple[int, int] | None = None


@contextmanager
def activated(owner: object, slots: Tensor | None) -> Iterator[None]:
    """Make the slots those that `owner`'s layers see; an inner one hides an outer one, None too."""
    token = _ACTIVE.set((*_ACTIVE.get(), (owner, _Route(slots))))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_slots(owner: object) -> Tensor | None:
    """The slots of the innermost route of this thread or task; None outside any, or for nobody."""
    for who, route in reversed(_ACTIVE.get()):  # asked by every layer: no call more than needed
        if who is owner:
            return route.slots
    return None


def active_tokens(owner: object) -> tuple[int, int] | None:
    """(batch, tokens) of the input that a model with the pool has now; None where none was seen."""
    route = _route(owner)
    return None if route is None else route.tokens


def _route(owner: object) -> _Route | None:
    return next((route for who, route in reversed(_ACTIVE.get()) if who is owner), None)


class _SeeTokens:
    """Before a model's forward: how many tokens each row of its input has."""

    def __init__(self, pool: AdapterPool) -> None:
        self.pool = pool

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = _route(self.pool)
        if route is None or route.slots is None:
            return
        named = (kwargs.get(name) for name in _INPUTS)
        given = (t for t in (*named, *args, *kwargs.values()) if isinstance(t, Tensor))
        # ids [B, T], or what they stand for, [B, T, K]
        shapes = (t.shape for t in given if t.dim() >= (3 if t.is_floating_point() else 2))
        shape = next(shapes, None)
        route.tokens = None if shape is None else (shape[0], shape[1])


def attach_pool(model: nn.Module, pool: AdapterPool) -> tuple[str, ...]:
    """Put a `MultiLoRALinear` around each of the model's layers that the pool has pages for.

    Outside `pool.route(...)` the model is what it was. Everything is checked before anything is
    changed.

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
    if not hasattr(pool, "form"):
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
    for owner in model.modules():
        inside = {id(m) for m in owner.modules()}
        if isinstance(owner, nn.TransformerEncoderLayer) and any(
            id(get_module(model, name)) in inside for name in names
        ):
            raise ValueError(
                "model: its nn.TransformerEncoderLayer reads its layers' weights without calling "
                "them, so no adapter would be seen"
            )
    layers: dict[str, tuple[Any, MultiLoRALinear | MultiLoRAEmbedding]] = {}
    for name in names:
        base: Any = get_module(model, name)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), pool.device)
        if device != pool.device:
            raise ValueError(f"{name}: is on {device}, the pool's pages are on {pool.device}")
        kind = MultiLoRAEmbedding if name in embeddings else MultiLoRALinear
        if (name in embeddings) != (name in pool.form.embeddings):
            raise ValueError(
                f"{name}: is a {type(base).__name__}, the pool's pages are not for one"
            )
        layers[name] = base, kind(base, pool, name)
    for base, layer in layers.values():
        replace_module(model, base, layer)
    model.register_forward_pre_hook(_SeeTokens(pool), with_kwargs=True)
    return tuple(layers)


def detach_pool(model: nn.Module) -> tuple[str, ...]:
    """Put the layers back that `attach_pool` wrapped; their names. Without a pool, nothing.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4, target_modules=["q_proj"])
        >>> names = lk.serving.attach_pool(model, pool)
        >>> lk.serving.detach_pool(model) == names
        True
    """
    model = unwrap(model)
    wrapped = [(n, m) for n, m in named_modules(model) if isinstance(m, POOLED)]
    for _, layer in wrapped:
        replace_module(model, layer, layer.base)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _SeeTokens):
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
        if isinstance(module, POOLED):
            return module.router  # type: ignore[return-value]
    raise ValueError(f"model: {type(model).__name__} has no pool; call attach_pool first")
