"""Which implementations of an op run here, and the fp64 oracle that they are held against."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.dispatch import BACKENDS, native, ops
from lora_kernels.ops.nf4.base import Meta
from lora_kernels.ops.nf4.reference import dense_weight

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Variant:
    """A backend on a device; the native one on the CPU once per instruction set."""

    backend: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.isa, self.device)))

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(use_backend(self.backend))
            if self.isa is not None:
                stack.enter_context(native.use_isa(self.isa))
            yield


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    found = []
    for backend in BACKENDS:
        for device in DEVICES:
            if backend == "native" and device == "cpu":
                found += [Variant(backend, device, isa) for isa in native.isas()]
            else:
                found.append(Variant(backend, device))
    return tuple(found)


def accepts(op: str, backend: str, args: tuple[Any, ...]) -> bool:
    """Whether the backend has the op and does not refuse these arguments."""
    implementation = ops()[op].implementations.get(backend)
    return implementation is not None and implementation.supports(*args) is None


def oracle_args(op: str, args: tuple[Any, ...]) -> list[Any]:
    """The arguments in fp64. A 4-bit base is decoded to the compute type first: the weight's
    rounding belongs to the format, not to the error of a kernel."""
    compute = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    schema = getattr(torch.ops.lora_kernels, op).default._schema
    named = dict(zip((a.name for a in schema.arguments), args, strict=True))
    if "base" in named and not Meta(*named["meta"]).is_dense:
        named["base"] = [dense_weight(named["base"], named["meta"], compute)]
        named["meta"] = named["meta"][:2]
    return [_double(a) for a in named.values()]


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [_double(v) for v in value] if isinstance(value, list) else value


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that equality tells +0 from -0 and sees NaN."""
    if not t.is_floating_point():
        return t
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
