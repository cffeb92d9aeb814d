"""Layers with adapters that share an input and run as one: q/k/v, gate/up, the gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.nn.common import cast_like
from lora_kernels.nn.lora_linear import LoRALinear
from lora_kernels.nn.qlora_linear import QLoRALinear
from lora_kernels.ops.glu.schema import activation_index

Layer = LoRALinear | QLoRALinear


class PackedLayers(nn.Module):
    """LoRALinear and QLoRALinear layers as submodules, run by one packed op where possible.

    The layers are shared, not copied. They keep their parameters, merging and checkpoint rules, and
    this module's state dict is theirs under the names in `layer_names`. In training each layer has
    its own dropout mask, though one seed is drawn for all.

    `why_not_packed()` says whether a forward takes the packed op, or why it calls the layers one
    after the other. The result is the same except for dropout's random numbers.
    """

    layer_names: ClassVar[tuple[str, ...]]

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        if len(layers) != len(self.layer_names):
            raise ValueError(
                f"layers: got {len(layers)}, expected {len(self.layer_names)}: "
                f"{', '.join(self.layer_names)}"
            )
        for name, layer in zip(self.layer_names, layers, strict=True):
            if not isinstance(layer, LoRALinear | QLoRALinear):
                raise TypeError(
                    f"{name}: got {type(layer).__name__}, expected LoRALinear or QLoRALinear"
                )
            self.add_module(name, layer)
        self._check_sizes()
        self.training = layers[0].training

    def _check_sizes(self) -> None:
        first = self._layer(0)
        for name, layer in self._named():
            if layer.in_features != first.in_features:
                raise ValueError(
                    f"{name}: has in_features {layer.in_features}, expected "
                    f"{first.in_features} as {self.layer_names[0]}"
                )

    def _layer(self, i: int) -> Layer:
        return self._modules[self.layer_names[i]]  # type: ignore[return-value]

    def _named(self) -> list[tuple[str, Layer]]:
        return [(name, self._layer(i)) for i, name in enumerate(self.layer_names)]

    def why_not_packed(self) -> str | None:
        """Why a forward would call the layers one by one; None if it takes the packed op."""
        first_name, first = self.layer_names[0], self._layer(0)
        for name, layer in self._named():
            reason = why_not_plain(layer)
            if reason is not None:
                return f"{name}: {reason}"
            for what, value, expected in (
                ("dropout", layer.dropout, first.dropout),
                ("training", layer.training, first.training),
                ("base dtype", layer._base_dtype(), first._base_dtype()),
                ("adapter dtype", layer.lora_A.dtype, first.lora_A.dtype),
                ("device", layer.lora_A.device, first.lora_A.device),
            ):
                if value != expected:
                    return f"{name}: has {what} {value}, {first_name} has {expected}"
        return None

    def _packed_arguments(self, x: Tensor) -> dict[str, Any]:
        return packed_arguments([layer for _, layer in self._named()], x)

    def extra_repr(self) -> str:
        reason = self.why_not_packed()
        return "packed" if reason is None else f"not packed: {reason}"


def packed_arguments(layers: Sequence[Layer], x: Tensor) -> dict[str, Any]:
    """What `functional.lora_packed_linear` takes beside x, of layers with one dropout and mode."""
    first = layers[0]
    own: list[Any] = [layer._parameters for layer in layers]  # getattr is slow
    weights = []
    for p, layer in zip(own, layers, strict=True):
        dense = p.get("weight")
        weights.append(layer.weight if dense is None else dense)
    return {
        "weights": weights,
        "lora_a": [p["lora_A"] for p in own],
        "lora_b": [p["lora_B"] for p in own],
        "scales": [layer.scale for layer in layers],
        "biases": [p["bias"] if "weight" in p else cast_like(p["bias"], x) for p in own],
        "dropout_p": first.dropout if first.training else 0.0,
    }


def why_not_plain(layer: nn.Module) -> str | None:
    """Why the packed op cannot stand for the layer's forward; None if it can."""
    if type(layer) not in (LoRALinear, QLoRALinear):
        return f"is a {type(layer).__name__}, expected LoRALinear or QLoRALinear"
    if "lora_A" not in layer._parameters:
        return "a wrapper around it (FSDP) has taken its parameters"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    ):
        return "has hooks"
    if not layer.adapter_enabled:
        return "its adapter is disabled"
    if layer.merged:
        return "its adapter is merged"
    if layer.use_dora:
        return "its adapter has a magnitude (DoRA)"
    return None


class LoRAQKV(PackedLayers):
    """The projections q, k and v of an attention layer.

    forward: x [..., K] to (q [..., N_q], k [..., N_k], v [..., N_v]), as a tuple.

    Examples:
        >>> q, k, v = (lk.LoRALinear(64, n, r=4) for n in (64, 16, 16))
        >>> qkv = lk.LoRAQKV.from_layers(q, k, v)
        >>> [y.shape[-1] for y in qkv(torch.randn(2, 64))]
        [64, 16, 16]
    """

    layer_names = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def from_layers(cls, q_proj: Layer, k_proj: Layer, v_proj: Layer) -> LoRAQKV:
        """Pack three layers, dense or 4-bit, of any output sizes and ranks. They are shared.

        Raises:
            TypeError: a layer is no LoRALinear or QLoRALinear.
            ValueError: their `in_features` differ.
        """
        return cls(q_proj, k_proj, v_proj)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return _projections(self, x)


class LoRAGateUp(PackedLayers):
    """The projections gate and up of a gated MLP.

    forward: x [..., K] to (gate [..., I], up [..., I]), as a tuple.

    Examples:
        >>> gate, up = lk.LoRALinear(64, 96, r=4), lk.LoRALinear(64, 96, r=4)
        >>> [y.shape[-1] for y in lk.LoRAGateUp.from_layers(gate, up)(torch.randn(2, 64))]
        [96, 96]
    """

    layer_names = ("gate_proj", "up_proj")

    @classmethod
    def from_layers(cls, gate_proj: Layer, up_proj: Layer) -> LoRAGateUp:
        """Pack two layers, dense or 4-bit, of any output sizes and ranks. They are shared.

        Raises:
            TypeError: a layer is no LoRALinear or QLoRALinear.
            ValueError: their `in_features` differ.
        """
        return cls(gate_proj, up_proj)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return _projections(self, x)


def _projections(module: PackedLayers, x: Tensor) -> tuple[Tensor, ...]:
    if module.why_not_packed() is None:
        return functional.lora_packed_linear(x, **module._packed_arguments(x))
    return tuple(layer(x) for _, layer in module._named())


class LoRAMLP(PackedLayers):
    """The gated MLP down(act(gate(x)) * up(x)) (Shazeer, 2020, "GLU Variants Improve Transformer").

    forward: x [..., K] to y [..., N].

    Attributes:
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).

    Examples:
        >>> gate, up = lk.LoRALinear(64, 96, r=4), lk.LoRALinear(64, 96, r=4)
        >>> down = lk.LoRALinear(96, 64, r=4)
        >>> lk.LoRAMLP.from_layers(gate, up, down)(torch.randn(2, 64)).shape
        torch.Size([2, 64])
    """

    layer_names = ("gate_proj", "up_proj", "down_proj")
    activation: str

    def __init__(self, *layers: Layer, activation: str = "silu") -> None:
        activation_index(activation)
        super().__init__(*layers)
        self.activation = activation

    @classmethod
    def from_layers(
        cls, gate_proj: Layer, up_proj: Layer, down_proj: Layer, activation: str = "silu"
    ) -> LoRAMLP:
        """Join three layers, dense or 4-bit, of any ranks. They are shared.

        Raises:
            TypeError: a layer is no LoRALinear or QLoRALinear.
            ValueError: their sizes do not fit each other, or the activation is none of the three.
        """
        return cls(gate_proj, up_proj, down_proj, activation=activation)

    def _check_sizes(self) -> None:
        gate, up, down = (layer for _, layer in self._named())
        inner = gate.out_features
        for name, what, size, expected, why in (
            ("up_proj", "in_features", up.in_features, gate.in_features, "gate_proj"),
            ("up_proj", "out_features", up.out_features, inner, "gate_proj"),
            ("down_proj", "in_features", down.in_features, inner, "gate_proj's out_features"),
        ):
            if size != expected:
                raise ValueError(f"{name}: has {what} {size}, expected {expected} as {why}")

    def forward(self, x: Tensor) -> Tensor:
        if self.why_not_packed() is None:
            arguments = self._packed_arguments(x)
            return functional.lora_mlp(x, **arguments, activation=self.activation)
        gate, up, down = (layer for _, layer in self._named())
        return down(functional.gated_activation(gate(x), up(x), self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation}, {super().extra_repr()}"
