"""The kinds of layers, in one table.

Code that treats layers differently asks `kind_of(layer)` and goes by what the kind says. A new kind
is one class and one entry of `KINDS`; no other file tests for a class of layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.integrations.peft import base_key_of, saved_key, tokens_key
from lora_kernels.integrations.transformers import is_conv1d
from lora_kernels.nn import LoRALinear, LoRAMixin, NF4Linear, QLoRALinear
from lora_kernels.nn.common import (
    check_finite_weight,
    check_linear_layer,
    make_linear,
    whole,
    whole_parameter,
)
from lora_kernels.nn.linear4bit import check_linear4bit, is_linear4bit
from lora_kernels.nn.multi_lora import MultiLoRALinear, Router
from lora_kernels.nn.multi_lora_embedding import MultiLoRAEmbedding
from lora_kernels.nn.multi_lora_training import TrainableMultiLoRALinear
from lora_kernels.nn.token_rows import DELTA, TokenRows

Options = Mapping[str, Any]
Classes = tuple[Any, ...]
PooledLayer = MultiLoRALinear | MultiLoRAEmbedding


class LayerKind:
    """What the package has to know about one kind of layer, and any module of no kind below.

    Attributes:
        ours: the layer's class is one of this package.
        linear: it is an nn.Linear or an NF4Linear, with or without an adapter.
        embedding: it is an nn.Embedding.
        four_bit: its weight is stored in 4 bits, so only the layer itself can compute with it.
        adapted: `apply_lora` has put an adapter on it.
        pooled: `serving.attach_pool` has wrapped it.
        in_training: `training.MultiLoRATrainer` has wrapped it.
        trains_rows: some rows of its weight train by themselves (`trainable_token_indices`).
        reported: `model_report` has a row for it.
        classes: the layer is an instance of all of them.
    """

    classes: Classes = ()
    ours = False
    linear = False
    embedding = False
    four_bit = False
    adapted = False
    pooled = False
    in_training = False
    trains_rows = False
    reported = False

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer is of this kind, given that it is of none before it in `KINDS`."""
        return all(isinstance(layer, cls) for cls in self.classes)

    # Putting an adapter on the layer.

    def refusal(self, layer: nn.Module) -> str | None:
        """Why no adapter can go on the layer; None when one can."""
        return f"is a {type(layer).__name__}, not torch.nn.Linear"

    def check(self, layer: Any, *, quantize: bool) -> None:
        """Raise what `with_adapter` and `to_nf4` would raise, without changing anything.

        Args:
            quantize: also check the values, which are about to be quantised.
        """
        check_linear_layer(layer)

    def with_adapter(self, layer: Any, adapter: Options, quantize: Options) -> LoRAMixin:
        """The layer with an adapter.

        Args:
            adapter: options as in `LoRALinear.from_linear`.
            quantize: options as in `NF4Linear.from_linear`; empty to leave a dense weight dense.
        """
        raise TypeError(f"layer: {self.refusal(layer)}")

    def to_nf4(self, layer: Any, quantize: Options) -> NF4Linear:
        """The layer with its weight in 4 bits, and without an adapter."""
        raise TypeError(f"layer: got {type(layer).__name__}, expected a dense linear layer")

    def to_pooled(self, layer: Any, router: Router, name: str) -> PooledLayer:
        """The layer wrapped, so that each row of a batch has its own adapter."""
        return MultiLoRALinear(layer, router, name)

    # Taking it off again.

    def base_layer(self, layer: Any) -> nn.Module:
        """The layer as it was before it got adapters; weight and bias are shared."""
        return layer

    def merged_layer(self, layer: Any, *, requantize: bool) -> nn.Module:
        """A layer that computes the same without an adapter: a plain nn.Linear, or an NF4Linear if
        the base is in 4 bits and `requantize` is set."""
        return layer

    # What the layer holds.

    def features(self, layer: Any) -> tuple[int, int]:
        """(in_features, out_features); (num_embeddings, embedding_dim) of an embedding."""
        return layer.in_features, layer.out_features

    def base_format(self, layer: Any) -> str:
        """How the base weight is stored, in a word or two."""
        return str(layer.weight.dtype).removeprefix("torch.")

    def base_operand(self, layer: Any) -> tuple[list[Tensor], list[int]]:
        """(base, base_meta), as the package's ops take the base weight."""
        return [layer.weight], [layer.out_features, layer.in_features]

    def own_weights(self, layer: Any) -> dict[str, Tensor]:
        """The weight, decoded if it is in 4 bits, and the bias."""
        own = layer._parameters
        return {key: own[key] for key in ("weight", "bias") if own.get(key) is not None}

    def weight_key(self, name: str, tensor: str) -> str:
        """PEFT's key for a copy of the layer's own weight or bias."""
        return saved_key(name, tensor)

    def uncounted_elements(self, layer: Any) -> int:
        """Elements of the weight that the sizes of the layer's parameters leave out."""
        return 0

    def uncounted_tensors(self, layer: Any) -> Iterator[Tensor]:
        """Tensors of the layer that are neither parameters nor buffers."""
        return iter(())


class Dense(LayerKind):
    """nn.Linear and subclasses of it that no other kind knows."""

    classes: Classes = (nn.Linear,)
    linear = True

    def refusal(self, layer: nn.Module) -> str | None:
        try:
            check_linear_layer(layer)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def check(self, layer: Any, *, quantize: bool) -> None:
        check_linear_layer(layer)
        if quantize:
            check_finite_weight(layer.weight)

    def with_adapter(self, layer: Any, adapter: Options, quantize: Options) -> LoRAMixin:
        if quantize:
            return QLoRALinear.from_linear(layer, **adapter, **quantize)
        return LoRALinear.from_linear(layer, **adapter)

    def to_nf4(self, layer: Any, quantize: Options) -> NF4Linear:
        return NF4Linear.from_linear(layer, **quantize)


class NF4(LayerKind):
    """NF4Linear: a weight in 4 bits, without an adapter."""

    classes: Classes = (NF4Linear,)
    ours = linear = four_bit = reported = True

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def check(self, layer: Any, *, quantize: bool) -> None:
        layer.weight.check()

    def with_adapter(self, layer: Any, adapter: Options, quantize: Options) -> LoRAMixin:
        return QLoRALinear.from_weight(layer.weight, layer.bias, **adapter).train(layer.training)

    def merged_layer(self, layer: Any, *, requantize: bool) -> nn.Module:
        return layer if requantize else layer.to_linear()

    def base_format(self, layer: Any) -> str:
        weight = layer.weight
        return f"{weight.quant_type}/{weight.block_size}{' nested' if weight.is_nested else ''}"

    def base_operand(self, layer: Any) -> tuple[list[Tensor], list[int]]:
        return layer.weight.base, layer.weight.meta

    def own_weights(self, layer: Any) -> dict[str, Tensor]:
        return super().own_weights(layer) | {"weight": layer.weight.dequantize()}

    def uncounted_elements(self, layer: Any) -> int:
        return layer.in_features * layer.out_features


class Linear4bit(Dense):
    """bitsandbytes' Linear4bit."""

    four_bit = True

    def fits(self, layer: nn.Module) -> bool:
        return is_linear4bit(layer)

    def refusal(self, layer: nn.Module) -> str | None:
        return None

    def check(self, layer: Any, *, quantize: bool) -> None:
        check_linear4bit(layer)

    def with_adapter(self, layer: Any, adapter: Options, quantize: Options) -> LoRAMixin:
        return QLoRALinear.from_linear4bit(layer, **adapter)

    def to_nf4(self, layer: Any, quantize: Options) -> NF4Linear:
        return NF4Linear.from_linear4bit(layer)

    def uncounted_elements(self, layer: Any) -> int:
        return layer.in_features * layer.out_features - layer.weight.numel()

    def uncounted_tensors(self, layer: Any) -> Iterator[Tensor]:
        state = getattr(layer, "quant_state", None)
        if state is not None:
            scales = (state.absmax, getattr(state.state2, "absmax", None))
            yield from (t for t in scales if isinstance(t, torch.Tensor))


class Adapted(LayerKind):
    """A layer with an adapter over a dense base."""

    classes: Classes = (LoRAMixin,)
    ours = linear = adapted = reported = True

    def refusal(self, layer: nn.Module) -> str | None:
        return "already has an adapter"

    # Adapted4bit derives from NF4 too, and must not get NF4's methods.
    check = LayerKind.check
    with_adapter = LayerKind.with_adapter

    def base_layer(self, layer: Any) -> nn.Module:
        bias = whole_parameter(layer.bias)
        linear = make_linear(whole(layer.weight), bias, training=layer.training)
        # The parameter itself, not a new one: another layer may share it.
        linear._parameters["weight"] = whole_parameter(layer._parameters["weight"])
        return linear

    def merged_layer(self, layer: Any, *, requantize: bool) -> nn.Module:
        return layer.to_linear()

    def weight_key(self, name: str, tensor: str) -> str:
        return base_key_of(name, tensor)


class Adapted4bit(Adapted, NF4):
    """A layer with an adapter over a base in 4 bits."""

    classes: Classes = (LoRAMixin, NF4Linear)

    def base_layer(self, layer: Any) -> nn.Module:
        bias = whole_parameter(layer.bias)
        return NF4Linear.from_weight(layer.weight, bias).train(layer.training)

    def merged_layer(self, layer: Any, *, requantize: bool) -> nn.Module:
        return layer.to_nf4_linear() if requantize else layer.to_linear()


class Wrapper(LayerKind):
    """A layer of this package around the model's own, which is its `base`."""

    ours = True

    def base_layer(self, layer: Any) -> nn.Module:
        return layer.base


class Pooled(Wrapper):
    """A layer whose batch rows each use their own adapter of a pool."""

    classes: Classes = (PooledLayer,)
    pooled = True


class InTraining(Wrapper):
    """A layer under several adapters that train in one batch."""

    classes: Classes = (TrainableMultiLoRALinear,)
    in_training = True

    def own_weights(self, layer: Any) -> dict[str, Tensor]:
        return kind_of(layer.base).own_weights(layer.base)

    def weight_key(self, name: str, tensor: str) -> str:
        return base_key_of(name, tensor)


class WithTokenRows(LayerKind):
    """A layer some of whose rows train by themselves."""

    ours = trains_rows = True

    def weight_key(self, name: str, tensor: str) -> str:
        return tokens_key(name).replace(DELTA, f"base_layer.{tensor}")


class TokenLinear(WithTokenRows, Dense):
    """An output layer some of whose rows train by themselves."""

    classes: Classes = (TokenRows, nn.Linear)


class Embedding(LayerKind):
    """nn.Embedding and subclasses of it."""

    classes: Classes = (nn.Embedding,)
    embedding = True

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    def to_pooled(self, layer: Any, router: Router, name: str) -> PooledLayer:
        return MultiLoRAEmbedding(layer, router, name)


class TokenEmbedding(WithTokenRows, Embedding):
    """An embedding some of whose rows train by themselves."""

    classes: Classes = (TokenRows, nn.Embedding)


class Conv1D(LayerKind):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight transposed."""

    def fits(self, layer: nn.Module) -> bool:
        return is_conv1d(layer)

    def refusal(self, layer: nn.Module) -> str | None:
        return "transformers' Conv1D stores its weight transposed (fan_in_fan_out)"


DENSE, NF4_LINEAR, LINEAR4BIT, CONV1D = Dense(), NF4(), Linear4bit(), Conv1D()
# The first that fits counts, so a class stands before those that it derives from.
KINDS: tuple[LayerKind, ...] = (
    Pooled(),
    InTraining(),
    Adapted4bit(),
    Adapted(),
    NF4_LINEAR,
    LINEAR4BIT,
    CONV1D,
    TokenLinear(),
    TokenEmbedding(),
    DENSE,
    Embedding(),
    LayerKind(),
)


def kind_of(layer: nn.Module) -> LayerKind:
    """The kind of a layer, or of any other module."""
    return next(kind for kind in KINDS if kind.fits(layer))
