"""Merging a model's adapters into its base, and running without them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_kernels.adapters.fuse import unfuse_projections
from lora_kernels.adapters.layer_kinds import NF4_LINEAR, kind_of
from lora_kernels.adapters.layers import adapter_layers, replace_module, require_adapters, unwrap
from lora_kernels.adapters.modules_to_save import (
    base_modules,
    keep,
    put_back,
    tensors_of,
    untied,
    whole_modules,
)
from lora_kernels.adapters.token_indices import (
    drop_tokens,
    merge_tokens,
    token_modules,
    token_owners,
)
from lora_kernels.integrations.transformers import output_layer, share_weight, untie
from lora_kernels.nn import LoRAMixin
from lora_kernels.nn.frozen_linear import restore
from lora_kernels.nn.token_rows import DELTA, TokenRows


def merge_adapters(model: nn.Module, *, safe: bool = False, requantize: bool = False) -> None:
    """Run every adapted layer as one linear layer, W + scale·B·A, until `unmerge_adapters`.

    With DoRA each row is scaled to its magnitude. The base weights are kept beside the merged ones,
    so unmerging is exact. Layers that are merged already are left alone.

    Args:
        model: a model with adapters.
        safe: refuse merged weights that are not finite; no layer is merged then.
        requantize: quantise the merged weights of 4-bit layers again. They are dense by default.

    Raises:
        ValueError: the model has no adapters, or a merged weight is not finite (checked with
            `safe`, and for 4-bit layers with `requantize`).

    Examples:
        >>> report = lk.apply_lora(model)
        >>> lk.merge_adapters(model)  # as fast as the base; state_dict stays what it was
        >>> model.model.layers[0].self_attn.q_proj.merged
        True
        >>> lk.unmerge_adapters(model)
    """
    done = []
    try:
        for name, layer in require_adapters(model):
            if layer.merged:
                continue
            try:
                in_4bit = {"requantize": requantize} if kind_of(layer).four_bit else {}
                layer.merge(safe=safe, **in_4bit)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            done.append(layer)
    except ValueError:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_adapters(model: nn.Module) -> None:
    """Undo `merge_adapters`, to the bit; layers that are not merged are left alone.

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> report = lk.apply_lora(model)
        >>> lk.merge_adapters(model)
        >>> lk.unmerge_adapters(model)
        >>> model.model.layers[0].self_attn.q_proj.merged
        False
    """
    for _, layer in require_adapters(model):
        if layer.merged:
            layer.unmerge()


def merge_and_unload(
    model: nn.Module, *, safe: bool = False, requantize: bool = False
) -> nn.Module:
    """Merge every adapter for good, in place, and leave plain nn.Linear layers.

    NF4Linear layers without an adapter are decoded too: the result is a plain model, which can be
    saved and loaded without this package. Modules that trained whole, and rows of an embedding,
    keep what they learned. Parameters are frozen.

    Args:
        model: a model with adapters.
        safe: refuse a merged weight that is not finite, and leave the model as it was.
        requantize: leave NF4Linear layers where the base is 4-bit.

    Returns:
        The model (the inner one, if it was compiled or wrapped for data parallelism).

    Raises:
        ValueError: the model has no adapters, or `safe` and a merged weight is not finite.

    Examples:
        >>> report = lk.apply_lora(model)
        >>> plain = lk.merge_and_unload(model)
        >>> type(plain.model.layers[0].self_attn.q_proj)
        <class 'torch.nn.modules.linear.Linear'>
    """
    model = unwrap(model)
    adapters = require_adapters(model)
    if safe:
        for name, layer in adapters:
            try:
                layer.merged_weight(safe=True)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for name, t in _learned(model):
            if not bool(torch.isfinite(t).all()):
                raise ValueError(f"{name}: holds non-finite values; nothing was changed")
    unfuse_projections(model)
    restore(output_layer(model))
    shared = share_weight(model)
    keep(model)
    merge_tokens(model)
    for _, layer in adapters:
        replace_module(model, layer, kind_of(layer).merged_layer(layer, requantize=requantize))
    if not requantize:
        for module in [m for m in model.modules() if kind_of(m) is NF4_LINEAR]:
            replace_module(model, module, NF4_LINEAR.merged_layer(module, requantize=False))
    if not share_weight(model) and (untied(model) or (shared and untie(model))):
        warnings.warn(
            "the output layer was trained, so its weight is no longer the embedding's: "
            "config.tie_word_embeddings is False now",
            stacklevel=2,
        )
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


def _learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of everything that trained beside the adapters."""
    for name, module in whole_modules(model):
        yield from ((f"{name}.{place}", t) for place, t in tensors_of(module).items())
    for name, rows in token_owners(model):
        yield f"{name}.{DELTA}", rows.trainable_tokens_delta


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter, in place, and restore the base.

    Layers are dense or 4-bit as before. Modules that trained whole, and rows of an embedding, have
    the base's values again. Everything is frozen. What was learned is lost, so call `save_adapter`
    before.

    Args:
        model: a model with adapters, merged or not.

    Returns:
        The model (the inner one, if it was compiled or wrapped for data parallelism).

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> report = lk.apply_lora(model, r=8)
        >>> base = lk.unload(model)
        >>> type(base.model.layers[0].self_attn.q_proj).__name__
        'Linear'
    """
    model = unwrap(model)
    adapters = require_adapters(model)
    unfuse_projections(model)
    restore(output_layer(model))
    for _, layer in adapters:
        replace_module(model, layer, kind_of(layer).base_layer(layer))
    put_back(model)
    drop_tokens(model)
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute with the base model alone inside the block, even if adapters are merged. Modules that
    train whole and rows of an embedding have the base's values too.

    Raises:
        ValueError: the model has no adapters.

    Examples:
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> base = model(ids).logits
        >>> report = lk.apply_lora(model)
        >>> with lk.disable_adapters(model):
        ...     torch.equal(model(ids).logits, base)
        True
    """
    require_adapters(model)
    switches: list[LoRAMixin | TokenRows] = [layer for _, layer in adapter_layers(model)]
    switches += [module for _, module in token_modules(model)]
    before = [(layer, layer.adapter_enabled) for layer in switches]
    for layer, _ in before:
        layer.adapter_enabled = False
    try:
        with base_modules(model):
            yield
    finally:
        for layer, enabled in before:
            layer.adapter_enabled = enabled
