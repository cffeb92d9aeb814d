"""NF4Weight: a 4-bit weight in bitsandbytes' storage format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lora_kernels.ops.common.base import (
    BLOCK_SIZES,
    COMPONENTS,
    QUANT_TYPES,
    Meta,
    check_block_size,
    check_quantised,
)
from lora_kernels.ops.common.checks import FLOATS, check_dtype, has_values, names
from lora_kernels.ops.common.code_tables import code_values
from lora_kernels.ops.common.kinds import check_kind, check_kinds
from lora_kernels.ops.nf4.double_quant import NESTED_BLOCK_SIZE, quantize_scales

_DTYPES = tuple(names([dtype]) for dtype in FLOATS)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight W [N, K] as 4-bit codes and one scale per block of `block_size` elements.

    Source: Dettmers et al., 2023, "QLoRA". `ops/common/base.py` states the layout of the tensors.

    Attributes:
        packed: u8 [(N*K + 1) // 2], two codes a byte, high nibble first.
        absmax: fp32 [ceil(N*K / block_size)]; u8 codes of it when the scales are quantised.
        shape: (N, K).
        block_size: elements per scale, a power of two from 32 to 4096.
        quant_type: "nf4" or "fp4".
        dtype: what the weight was before, and what `dequantize()` gives by default.
        nested_absmax, nested_map, nested_offset, nested_block_size: the quantised scales'
            own scales (fp32), code map (fp32 [256]), offset (fp32 [1]) and block size; None and 0
            when the scales are plain.
        base, meta: the component tensors, and the sizes and format, as the ops take them.

    Examples:
        >>> weight = lk.NF4Weight.quantize(torch.randn(32, 64), block_size=64)
        >>> weight.packed.shape  # two codes a byte
        torch.Size([1024])
        >>> weight.dequantize().shape
        torch.Size([32, 64])
        >>> sorted(weight.state_dict_entries("q_proj."))[:2]  # bitsandbytes' keys
        ['q_proj.weight', 'q_proj.weight.absmax']
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block_size: int = 64
    quant_type: str = "nf4"
    dtype: torch.dtype = torch.float32
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None
    nested_block_size: int = 0
    # Derived once, for a layer's every call: what the ops take, and whether it was checked.
    base: list[Tensor] = field(init=False, repr=False)
    meta: list[int] = field(init=False, repr=False)
    _fits: bool = field(init=False, repr=False)

    @classmethod
    def quantize(
        cls, w: Tensor, block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
    ) -> NF4Weight:
        """Quantise a weight [N, K] of any floating dtype, exactly as bitsandbytes does on a CPU.

        Args:
            w: the weight; it is only read.
            block_size: elements per scale, a power of two from 32 to 4096.
            double_quant: quantise the fp32 scales to 8 bits (0.516 instead of 0.5625 bytes per
                weight at block size 64).
            quant_type: "nf4" or "fp4".

        Raises:
            TypeError: w is not floating point.
            ValueError: w is not 2-D or holds a non-finite value; a parameter is out of range.
        """
        check_kinds(NF4Weight.quantize, locals())
        check_dtype("w", w, FLOATS)
        if w.dim() != 2:
            raise ValueError(f"w: got shape {list(w.shape)}, expected [N, K]")
        check_block_size("block_size", block_size)
        check_quant_type(quant_type)
        packed, absmax = torch.ops.lora_kernels.nf4_quantize(
            w.detach().contiguous(), block_size, QUANT_TYPES.index(quant_type)
        )
        plain = cls(packed, absmax, (w.shape[0], w.shape[1]), block_size, quant_type, w.dtype)
        if not double_quant or absmax.numel() == 0:
            return plain
        nested = quantize_scales(absmax)
        return replace(
            plain,
            absmax=nested.codes,
            nested_absmax=nested.absmax,
            nested_map=nested.map,
            nested_offset=nested.offset,
            nested_block_size=NESTED_BLOCK_SIZE,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K]: code * scale in fp32, rounded once to `dtype`."""
        return torch.ops.lora_kernels.nf4_dequantize(self.base, self.meta, dtype or self.dtype)

    def __post_init__(self) -> None:
        base = [self.packed, self.absmax]
        if self.nested_absmax is not None:
            assert self.nested_map is not None and self.nested_offset is not None
            base += [self.nested_absmax, self.nested_map, self.nested_offset]
        check_quant_type(self.quant_type)
        quant_type = QUANT_TYPES.index(self.quant_type)
        meta = [*self.shape, self.block_size, quant_type, self.nested_block_size]
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "meta", meta)
        object.__setattr__(self, "_fits", False)

    def check(self) -> NF4Weight:
        """Raise ValueError or TypeError unless the component tensors fit each other."""
        if not self._fits:
            check_quantised(self.base, Meta(*self.meta))
            object.__setattr__(self, "_fits", True)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The component tensors by attribute name, absent ones left out."""
        return {k: v for k in COMPONENTS if (v := getattr(self, k)) is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> NF4Weight:
        """The same format over other component tensors (keys as in `tensors()`)."""
        components: dict[str, Any] = dict(tensors)
        return replace(self, **components)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The weight on another device. Dtypes never change: they are the format."""
        return self.with_tensors({k: v.to(device) for k, v in self.tensors().items()})

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all component tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    def __repr__(self) -> str:
        nested = ", double_quant" if self.is_nested else ""
        return (
            f"NF4Weight({self.quant_type}, shape={list(self.shape)}, block_size={self.block_size}"
            f"{nested}, dtype={names([self.dtype])}, device={self.device})"
        )

    def state_dict_entries(self, prefix: str = "") -> dict[str, Tensor]:
        """The entries that bitsandbytes' Linear4bit saves for this weight.

        Args:
            prefix: what stands before `weight`, such as "model.layers.0.mlp.up_proj.".
        """
        key = f"{prefix}weight"
        entries = {
            key: self.packed.view(-1, 1),
            f"{key}.absmax": self.absmax,
            f"{key}.quant_map": self.quant_map.clone(),
        }
        if self.nested_absmax is not None and self.nested_map is not None:
            entries[f"{key}.nested_absmax"] = self.nested_absmax
            entries[f"{key}.nested_quant_map"] = self.nested_map.clone()
        for name, value in vars(self.quant_state).items():
            entries[f"{key}.quant_state.{name}"] = value
        return entries

    # torch.distributed.checkpoint looks every key of a state dict up as a path of attributes.

    @property
    def quant_map(self) -> Tensor:
        """The values of the codes, fp32 [16]."""
        # Not the cached ones: under FakeTensorMode they have none, and the cache would keep them.
        return code_values.__wrapped__(QUANT_TYPES.index(self.quant_type), self.device)

    @property
    def nested_quant_map(self) -> Tensor | None:
        """`nested_map` by its name in a state dict."""
        return self.nested_map

    @property
    def quant_state(self) -> SimpleNamespace:
        """The format as JSON in bytes, u8, named as in a state dict: `bitsandbytes__nf4`."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": names([self.dtype]),
            "shape": list(self.shape),
        }
        if self.nested_offset is not None:
            state["nested_blocksize"] = self.nested_block_size
            state["nested_dtype"] = "float32"
            readable = has_values(self.nested_offset)  # else there is no number to save
            with unset_fake_temporarily():  # a weight with values, saved in a FakeTensorMode
                state["nested_offset"] = float(self.nested_offset) if readable else 0.0
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
        return SimpleNamespace(**{f"bitsandbytes__{self.quant_type}": text})

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "",
        device: torch.device | str | None = None,
    ) -> NF4Weight:
        """Read the entries that bitsandbytes' Linear4bit (or `state_dict_entries`) saved.

        Args:
            state: a state dict; other entries are ignored.
            prefix: what stands before `weight`.
            device: where the tensors go; None leaves them where they are.

        Raises:
            KeyError: an entry is missing.
            ValueError, TypeError: an entry's shape, dtype or content does not fit.
        """
        check_kinds(NF4Weight.from_state_dict, locals())
        key = f"{prefix}weight"
        info = _quant_state(state, key)
        packed = _packed_bytes(key, _entry(state, key), (info.shape[0] * info.shape[1] + 1) // 2)
        absmax = _entry(state, f"{key}.absmax")
        _check_map(state, key, info.quant_type)
        weight = cls(packed, absmax, info.shape, info.block_size, info.quant_type, info.dtype)
        if info.nested_block_size:
            offset = [info.nested_offset]
            weight = replace(
                weight,
                nested_absmax=_entry(state, f"{key}.nested_absmax"),
                nested_map=_entry(state, f"{key}.nested_quant_map"),
                nested_offset=torch.tensor(offset, dtype=torch.float32, device=packed.device),
                nested_block_size=info.nested_block_size,
            )
        elif absmax.dtype in FLOATS:
            weight = replace(weight, absmax=absmax.float())
        suffixes = ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".nested_offset")
        check_quantised(weight.base, Meta(*weight.meta), [f"{key}{s}" for s in suffixes])
        return weight if device is None else weight.to(device)


def check_quant_type(quant_type: str) -> None:
    check_kind("quant_type", quant_type, str)
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: got {quant_type!r}, expected one of {QUANT_TYPES}")


def _entry(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise KeyError(f"{key}: is missing from the state dict")
    return state[key]


class _QuantState(NamedTuple):
    """The JSON entry, checked."""

    quant_type: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, int]
    nested_block_size: int
    nested_offset: float


def _quant_state(state: Mapping[str, Tensor], key: str) -> _QuantState:
    stem = f"{key}.quant_state.bitsandbytes__"
    found = [k for k in state if k.startswith(stem)]
    if len(found) != 1:
        raise KeyError(
            f"{stem}nf4 (or fp4): found {len(found)} such entries in the state dict, expected 1"
        )
    name = found[0]
    try:
        info = json.loads(bytes(state[name].tolist()).decode())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: is not JSON in bytes ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{name}: got {info!r}, expected a JSON object")

    def field(field_name: str, ok: Callable[[Any], bool], expected: str) -> Any:
        value = info.get(field_name)
        if not ok(value):
            raise ValueError(f"{name}: got {field_name} {value!r}, expected {expected}")
        return value

    nested = "nested_blocksize" in info
    return _QuantState(
        field(
            "quant_type",
            lambda v: v == name.removeprefix(stem) and v in QUANT_TYPES,
            f"one of {QUANT_TYPES}, and that of the entry's name",
        ),
        field(
            "blocksize",
            lambda v: isinstance(v, int) and v in BLOCK_SIZES,
            f"a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}",
        ),
        getattr(torch, field("dtype", lambda v: v in _DTYPES, f"one of {names(FLOATS)}")),
        tuple(field("shape", _is_shape, "[N, K]")),
        field("nested_blocksize", _is_positive, "a positive integer") if nested else 0,
        field("nested_offset", _is_number, "a finite number") if nested else 0.0,
    )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(n, int) and n >= 0 for n in value)
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _packed_bytes(key: str, t: Tensor, size: int) -> Tensor:
    """The codes as u8 [size], whatever type they were stored in (it only reinterprets bytes)."""
    # A storage type wider than a byte rounds the byte count up.
    if t.nbytes != -(-size // t.itemsize) * t.itemsize:
        raise ValueError(f"{key}: holds {t.nbytes} bytes, expected {size} for the stored shape")
    return t.reshape(-1).view(torch.uint8)[:size]


def _check_map(state: Mapping[str, Tensor], key: str, quant_type: str) -> None:
    """A code table other than the format's own would decode to other weights."""
    table = state.get(f"{key}.quant_map")
    if table is None:
        return
    expected = code_values(QUANT_TYPES.index(quant_type), torch.device("cpu"))
    # bitsandbytes' CPU copy of the FP4 table is written with four decimals.
    if table.shape != expected.shape or (table.cpu().float() - expected).abs().max() > 1e-4:
        raise ValueError(f"{key}.quant_map: is not the table of {quant_type}")
