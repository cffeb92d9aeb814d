"""NF4Linear: a frozen linear layer whose weight is stored in 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lora_kernels import functional
from lora_kernels.nn.common import (
    cast_like,
    check_features,
    check_linear_layer,
    draw_linear_weight,
    frozen,
    make_linear,
    set_buffer,
)
from lora_kernels.nn.linear4bit import weight_from_linear4bit
from lora_kernels.ops.common.base import check_block_size
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.nf4.double_quant import NESTED_BLOCK_SIZE
from lora_kernels.ops.nf4.weight import NF4Weight, check_quant_type

COMPONENTS = ("packed", "absmax", "nested_absmax", "nested_map", "nested_offset")


class NF4Linear(nn.Module):
    """y = x·Wᵀ + bias with W frozen in 4 bits (Dettmers et al., 2023, "QLoRA").

    W is decoded to x's dtype, so the layer has no compute dtype of its own. The codes and scales
    are buffers: they move with the module from device to device, but are never cast. `.half()` and
    `.to(dtype)` cast the bias, and set the dtype to which the weight is decoded for a merge. The
    state dict holds bitsandbytes' keys (`weight`, `weight.absmax`, ...). Loading one takes over
    its block size and format; a dense weight [N, K] is quantised on loading with this layer's.

    DistributedDataParallel sends buffers with every forward, unless it gets
    `broadcast_buffers=False`. FSDP leaves them whole in every process.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias (frozen).
        block_size: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        quant_type: "nf4" or "fp4".
        device, dtype: of the bias, and of the weight that is quantised.

    Examples:
        >>> layer = lk.NF4Linear.from_linear(torch.nn.Linear(64, 32), block_size=64)
        >>> layer(torch.randn(3, 64)).shape
        torch.Size([3, 32])
        >>> layer.to_linear()  # decoded again
        Linear(in_features=64, out_features=32, bias=True)
    """

    in_features: int
    out_features: int
    bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_features(in_features, out_features)
        check_block_size("block_size", block_size)
        check_quant_type(quant_type)
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        values = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self._set_base(
            empty_weight(
                (out_features, in_features), block_size, double_quant, quant_type, device, dtype
            ),
            None if values is None else Parameter(values, requires_grad=False),
        )
        self.reset_parameters()

    def _set_base(self, weight: NF4Weight, bias: Parameter | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weights: dict[str, NF4Weight] = {}
        self._store("", weight)
        self.register_parameter("bias", frozen(bias))

    def _store(self, slot: str, weight: NF4Weight) -> None:
        """Keep a weight's tensors as buffers whose names start with `slot`."""
        tensors = weight.tensors()
        for name in COMPONENTS:
            set_buffer(self, slot + name, tensors.get(name))
        self._weights[slot] = weight.check()

    def _stored(self, slot: str) -> NF4Weight:
        weight, buffers = self._weights[slot], self._buffers
        # `.to` and torch.func replace the buffers. The NF4Weight is kept beside them because making
        # one takes longer than a small layer's kernel.
        for name in COMPONENTS:  # half the time of `all` over a generator
            if buffers[slot + name] is not getattr(weight, name):
                break
        else:
            return weight
        tensors = {name: buffers[slot + name] for name in COMPONENTS}
        weight = weight.with_tensors({k: t for k, t in tensors.items() if t is not None})
        # Checked here, so that every trace of the next forward is the same.
        self._weights[slot] = weight.check()
        return weight

    def _forget(self, slot: str) -> None:
        del self._weights[slot]
        for name in COMPONENTS:
            delattr(self, slot + name)

    @property
    def weight(self) -> NF4Weight:
        """The weight; its tensors are this module's buffers, not copies."""
        return self._stored("")

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: Parameter | None = None) -> NF4Linear:
        """A layer around an existing NF4Weight and bias, neither of them copied."""
        check_kinds(NF4Linear.from_weight, locals())
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        NF4Linear._set_base(module, weight.check(), bias)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
    ) -> NF4Linear:
        """Quantise a plain linear layer; the bias is shared, training or eval mode kept.

        Raises:
            TypeError: `linear` is not a plain nn.Linear.
            ValueError: its weight holds non-finite values or has no storage (meta device), or an
                option is out of its range.
        """
        weight = quantize_linear(linear, block_size, double_quant, quant_type)
        return NF4Linear.from_weight(weight, linear.bias).train(linear.training)

    @classmethod
    def from_linear4bit(cls, layer: nn.Module) -> NF4Linear:
        """Take over the weight and bias of a bitsandbytes Linear4bit, neither of them copied.

        Raises:
            TypeError: `layer` is no Linear4bit.
            ValueError: bitsandbytes has already repacked the weight for CPU inference.
        """
        weight = weight_from_linear4bit(layer)
        return NF4Linear.from_weight(weight, layer.bias).train(layer.training)  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as nn.Linear does, and quantise; nothing happens on meta."""
        old = self.weight
        if old.device.type == "meta":
            return
        dense = torch.empty(old.shape, device=old.device, dtype=old.dtype)
        draw_linear_weight(dense, self.bias)
        self._store("", self._quantize_like(old, dense))

    @staticmethod
    def _quantize_like(old: NF4Weight, dense: Tensor) -> NF4Weight:
        return NF4Weight.quantize(dense, old.block_size, old.is_nested, old.quant_type)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N] in x's dtype."""
        return functional.nf4_linear(x, self.weight, bias=cast_like(self.bias, x))

    def to_linear(self, *, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain, frozen nn.Linear with the decoded weight (in its original dtype by default)."""
        return make_linear(self.weight.dequantize(dtype), self.bias, training=self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        names = (slot + name for slot in self._weights for name in COMPONENTS)
        fixed = {id(t) for name in names if (t := getattr(self, name)) is not None}

        def keep_format(t: Tensor) -> Tensor:
            moved = fn(t)
            if id(t) in fixed and moved.dtype != t.dtype:
                return t.to(moved.device)
            return moved

        super()._apply(keep_format, recurse)
        for slot in self._weights:
            weight = self._stored(slot)  # drops the tensors that were replaced
            # A cast of the model applies to the dense weight that this one was made from.
            dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
            if dtype != weight.dtype:
                self._weights[slot] = replace(weight, dtype=dtype)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.state_dict_entries(prefix))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}weight"
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if self.packed.is_meta and not assign:
            warnings.warn(
                f"for {key}: loading into a layer on the meta device is a no-op; pass assign=True, "
                "or call to_empty first",
                stacklevel=2,
            )
        else:
            try:
                self._load_weight(state_dict, prefix, assign)
            except (KeyError, TypeError, ValueError) as error:
                error_msgs.append(f"While loading {key}: {error.args[0]}")
        ours = {key, *(f"{key}.{part}" for part in _entry_names(state_dict, f"{key}."))}
        unexpected_keys[:] = [k for k in unexpected_keys if k not in ours]

    def _load_weight(self, state_dict: Mapping[str, Tensor], prefix: str, assign: bool) -> None:
        key = f"{prefix}weight"
        old, tensor = self.weight, state_dict[key]
        if tensor.is_floating_point() and not _entry_names(state_dict, f"{key}."):
            if tuple(tensor.shape) != old.shape:
                raise ValueError(f"got shape {list(tensor.shape)}, expected {list(old.shape)}")
            source = tensor if assign else tensor.to(old.device)
            self._store("", self._quantize_like(old, source))
            return
        new = NF4Weight.from_state_dict(state_dict, prefix)
        if new.shape != old.shape:
            raise ValueError(f"got shape {list(new.shape)}, expected {list(old.shape)}")
        if not assign:
            new = new.with_tensors(
                {name: t.detach().to(old.device, copy=True) for name, t in new.tensors().items()}
            )
        self._store("", new)

    def extra_repr(self) -> str:
        form = self.weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={form.quant_type}, "
            f"block_size={form.block_size}, double_quant={form.is_nested}"
        )


def _entry_names(state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The keys, below `weight`, of the parts of a 4-bit weight in a state dict."""
    known = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    names = (key[len(prefix) :] for key in state_dict if key.startswith(prefix))
    return [n for n in names if n in known or n.startswith("quant_state.bitsandbytes__")]


def quantize_linear(
    linear: nn.Linear, block_size: int, double_quant: bool, quant_type: str
) -> NF4Weight:
    """The weight of a plain linear layer in 4 bits."""
    check_linear_layer(linear)
    if linear.weight.is_meta:
        raise ValueError("linear.weight: is on the meta device, expected values to quantise")
    return NF4Weight.quantize(linear.weight, block_size, double_quant, quant_type)


def empty_weight(
    shape: tuple[int, int],
    block_size: int,
    double_quant: bool,
    quant_type: str,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> NF4Weight:
    """An NF4Weight of the given format with uninitialised tensors."""
    n = shape[0] * shape[1]
    blocks = -(-n // block_size)
    nested = double_quant and blocks > 0

    def empty(size: int, of: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=of, device=device)

    weight = NF4Weight(
        empty((n + 1) // 2, torch.uint8),
        empty(blocks, torch.uint8 if nested else torch.float32),
        shape,
        block_size,
        quant_type,
        dtype,
    )
    if not nested:
        return weight
    return replace(
        weight,
        nested_absmax=empty(-(-blocks // NESTED_BLOCK_SIZE), torch.float32),
        nested_map=empty(256, torch.float32),
        nested_offset=empty(1, torch.float32),
        nested_block_size=NESTED_BLOCK_SIZE,
    )
