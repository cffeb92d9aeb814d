"""Tensor maps of the TMA, and Triton's tensor descriptors as a kernel's arguments."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch

from tools.ptxemu.library import PtxError
from tools.ptxemu.memory import Memory

_MAGIC = 0x50614D54
# Numbers of tensormap.replace.elemtype, and the bytes of each.
_ELEMENTS = {
    **{"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5, "float16": 6},
    **{"float32": 7, "float32_ftz": 8, "float64": 9, "bfloat16": 10, "tfloat32": 11},
    **{"tfloat32_ftz": 12, "int8": 0, "bool": 0, "float8_e4m3fn": 0, "float8_e5m2": 0, "int16": 1},
}
_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
Arguments = list[tuple[str | None, Any]]  # names, of what is a buffer, and values


def tensor_map(
    t: Any,
    box: Sequence[int],
    *,
    mem: Memory | None = None,
    swizzle: int = 0,
    shape: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    elem_type: str | int | None = None,
    oob_nan: bool = False,
    name: str | None = None,
) -> bytes:
    """128 bytes to pass where a kernel takes a CUtensorMap by value (`const __grid_constant__
    CUtensorMap`), in the emulator's own encoding.

    Args:
        t: the base tensor, or its device address (then `shape` and `strides` are needed).
        box, shape, strides: the outermost dimension first, strides in elements; those of t where
            not given.
        swizzle: 0 none, 1 of 32, 2 of 64, 3 of 128 bytes.
        elem_type: a name in `_ELEMENTS`, or a number of tensormap.replace.
    """
    if elem_type is None:
        elem_type = str(t.dtype).removeprefix("torch.")
    element = _ELEMENTS[elem_type] if isinstance(elem_type, str) else elem_type
    size = _BYTES[element]
    sizes = [int(x) for x in (t.shape if shape is None else shape)]
    if strides is None:
        tensor = isinstance(t, torch.Tensor)
        strides = t.stride() if tensor else [x // t.itemsize for x in t.strides]
    steps, rank = [int(x) for x in strides], len(sizes)
    if not (1 <= rank <= 5 and len(steps) == rank == len(box)):
        raise ValueError("tensor_map: rank 1..5, the same for shape, strides and box")
    if steps[-1] != 1:
        raise ValueError("tensor_map: the last stride must be 1")
    moved = [s * size for s in steps[:-1]]
    if any(s % 16 for s in moved):
        raise ValueError(f"tensor_map: strides must be multiples of 16 bytes, got {moved} bytes")
    if isinstance(t, int):
        address = t
    else:
        assert mem is not None, "a tensor's address comes from a Memory"
        address = mem.ptr(t, name=name)
    if address % 16:
        raise ValueError("tensor_map: the base must be 16-byte aligned")
    ones = [1] * rank
    format_ = (rank - 1, element, 0, swizzle, int(oob_nan), 0, 0, 0)
    fields = (*_filled(sizes, 5), *_filled([int(x) for x in box], 5), *_filled(ones, 5))
    packed = struct.pack("<QI8B5I5H5Bx4Q", address, _MAGIC, *format_, *fields, *_filled(moved, 4))
    return packed.ljust(128, b"\0")


def _filled(values: list[int], count: int) -> list[int]:
    """The innermost dimension first, zeros after the outermost."""
    return values[::-1] + [0] * (count - len(values))


def is_descriptor(a: Any) -> bool:
    """Whether it is a triton.tools.tensor_descriptor.TensorDescriptor."""
    return all(hasattr(a, k) for k in ("base", "shape", "strides", "block_shape"))


def descriptor_arguments(
    d: Any, meta: dict[str, Any] | None, mem: Memory, name: str | None
) -> Arguments:
    """As make_tensordesc_arg in triton/backends/nvidia/driver.py: with metadata (sm_90) a tensor
    map, shape and strides; without, base, shape, strides, padding, rounding, shape, strides."""
    nan = getattr(d, "padding", "zero") == "nan"
    tf32 = bool(getattr(d, "round_f32_to_tf32", False))
    shape, strides = [int(x) for x in d.shape], [int(x) for x in d.strides]
    if meta is None:
        rest = (*shape, *strides, nan, tf32, *shape, *strides)
        return [(name, d.base), *((None, x) for x in rest)]
    if meta.get("is_im2col"):
        raise PtxError("im2col tensor descriptors are not supported")
    if meta["fp4_padded"]:
        raise PtxError("fp4-padded tensor descriptors are not supported")
    made = tensor_map(
        d.base,
        meta["block_size"],
        mem=mem,
        swizzle=meta["swizzle"],
        shape=shape,
        strides=strides,
        elem_type=11 if tf32 else meta["elem_type"],
        oob_nan=nan,
        name=name,
    )
    return [(name, made), *((None, x) for x in (*shape, *strides))]
