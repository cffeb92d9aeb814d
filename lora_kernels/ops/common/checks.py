"""Argument checks of every family: each names the argument, its value and what was expected."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# torch.jit.trace warns wherever Python code reads a shape. The traced graph does not depend on the
# shapes read here, except that a shape may raise an error.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lora_kernels\.")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_dtype(name: str, t: Tensor, expected: Sequence[torch.dtype] = FLOATS) -> None:
    if t.dtype not in expected:
        raise TypeError(f"{name}: got dtype {names([t.dtype])}, expected {names(expected)}")


def check_shape(name: str, t: Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds sizes; a string is a dimension of any size, and names it."""
    shape = t.shape
    if len(shape) == len(expected):
        # Before every call of a small layer: a loop takes half the time of `all` over a generator.
        for size, want in zip(shape, expected):  # noqa: B905
            if size != want and not isinstance(want, str):
                break
        else:
            return
    sizes = ", ".join(str(e) for e in expected)
    raise ValueError(f"{name}: got shape {list(shape)}, expected [{sizes}]")


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name}: is on {t.device}, expected {device} as the input")


def has_values(t: Tensor) -> bool:
    """Whether a tensor's values can be read: not on the meta device, nor in a FakeTensorMode."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def check_finite(name: str, t: Tensor) -> None:
    """Reads the values: for set-up time only."""
    bad = (~torch.isfinite(t)).flatten().nonzero()
    if bad.numel():
        raise ValueError(
            f"{name}: holds {bad.shape[0]} non-finite value(s), first at flat index {int(bad[0])}"
        )


def check_optional_vector(
    name: str, t: Tensor | None, size: int, like: Tensor, expected: Sequence[torch.dtype] = FLOATS
) -> None:
    if t is not None:
        check_shape(name, t, [size])
        check_dtype(name, t, expected)
        check_device(name, t, like.device)
