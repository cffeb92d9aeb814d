"""Merging a model's adapters into its base, and running without them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_kernels.adapters.layers import adapter_layers, replace_module, require_adapters, unwrap
from lora_kernels.integrations.transformers import output_layer, untie
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear


def merge_adapters(model: nn.Module, *, safe: bool = False, requantize: bool = False) -> None:
    """Run every adapted layer as one linear layer, W + scale·B·A, until `unmerge_adapters`.

    DoRA's rows are scaled to their magnitudes.

    The base weights stay beside the merged ones, so unmerging is exact. Layers that are merged
    already are left alone.

    Args:
        model: a model with adapters.
        safe: refuse a merged weight that is not finite; then no layer is merged.
        requantize: keep the merged weights of 4-bit layers in 4 bits; dense by default.

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
                if isinstance(layer, QLoRALinear):
                    layer.merge(safe=safe, requantize=requantize)
                else:
                    layer.merge(safe=safe)
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

    NF4Linear layers without an adapter are decoded as well, so that what remains is a plain model
    that can be saved and loaded without this package. Parameters stay frozen.

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
    if isinstance(output_layer(model), LoRALinear) and untie(model):
        warnings.warn(
            "the output layer was adapted, so its merged weight is no longer the embedding's: "
            "config.tie_word_embeddings is False now",
            stacklevel=2,
        )
    for _, layer in adapters:
        new: nn.Module
        if requantize and isinstance(layer, QLoRALinear):
            new = layer.to_nf4_linear()
        else:
            new = layer.to_linear()
        replace_module(model, layer, new)
    if not requantize:
        for plain in [m for m in model.modules() if isinstance(m, NF4Linear)]:
            replace_module(model, plain, plain.to_linear())
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Compute the base model alone, merged or not, until the block ends.

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
    before = [(layer, layer.adapter_enabled) for _, layer in adapter_layers(model)]
    for layer, _ in before:
        layer.adapter_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.adapter_enabled = enabled
