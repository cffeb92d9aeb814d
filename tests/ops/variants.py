"""Which implementations of an op run here, and the fp64 oracle that they are held against."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.dispatch import BACKENDS, native
from lora_kernels.dispatch.registry import refusal
from lora_kernels.ops.common.configs import GENERIC, GemmConfig
from lora_kernels.ops.common.launch import Executor, use_executor
from lora_kernels.ops.common.strategies import STRATEGIES
from lora_kernels.ops.gather.triton.plan import SCHEDULES
from tests.ops.case import Case
from tools.gpu_proofs import ways

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Ops whose Triton kernels know several ways (`use_strategy`).
WITH_STRATEGIES = ("lora_linear_fwd", "lora_linear_bwd", "lora_packed_fwd", "lora_packed_bwd")
# Ops whose Triton kernels are cut several ways (`use_schedule`).
WITH_WAYS = ("gather_lora_fwd", "gather_lora_add", "gather_lora_bwd")
# Their passes again, after what is read by token: fewer cases.
WITH_THE_SAME = ("gather_lora_embed_fwd", "gather_lora_embed_add", "gather_lora_embed_bwd")
# No backend by name, but what a call comes to by itself, on the short way that users take.
DEFAULT = "default"
# The way that a base's product adds many adapters itself, and the cases that it is for.
FUSED = "fused"
OVER_BASES = ("-base", "-nf4", "-few-slots", "-one-slot", "-no-adapter", "-rank-0", "-fp32-pages")
# A forced strategy in the interpreter takes one case in so many, other ones for each strategy.
THINNED = 12


class Interpreted(Executor):
    """Triton's interpreter, which costs a millisecond an operation whatever the tile: one large
    tile where the cost model would take many small ones."""

    on_cpu = True
    device = replace(GENERIC, name="interpreter", tiles=(GemmConfig(64, 64, 32, 4, 2),))


def interpreting() -> bool:
    """Whether Triton's kernels run on CPU tensors here: TRITON_INTERPRET=1."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Variant:
    """A backend on a device; the native one on the CPU once per instruction set, Triton's also
    once per strategy. Where a strategy refuses a case the cost model's choice runs."""

    backend: str
    device: str = "cpu"
    isa: str | None = None
    strategy: str | None = None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.strategy, self.isa, self.device)))

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(use_backend(None if self.backend == DEFAULT else self.backend))
            if self.isa is not None:
                stack.enter_context(native.use_isa(self.isa))
            if self.backend == "triton":
                stack.enter_context(ways.use(self.strategy))
                if self.device == "cpu" and interpreting():
                    stack.enter_context(use_executor(Interpreted()))
            yield

    def takes(self, case: Case) -> bool:
        """Whether the grid of cases includes this one (a backend may still refuse it)."""
        if self.device != "cpu":
            return True
        if self.strategy is None:
            # Every other case is forced one of the ways.
            ways = WITH_WAYS + WITH_THE_SAME
            return self.backend != "triton" or case.op not in ways or case.core
        turn = zlib.crc32(f"{case.op}/{case.label}".encode()) % THINNED
        if self.strategy == FUSED:
            return case.label.endswith(OVER_BASES)
        if self.strategy in SCHEDULES:
            many = 2 if case.op in WITH_WAYS else 6
            return turn % many == SCHEDULES.index(self.strategy)
        return turn == STRATEGIES.index(self.strategy)


def variants_of(op: str) -> tuple[Variant, ...]:
    """Every way to run an op, its strategies included."""
    found = list(all_variants())
    if op in WITH_STRATEGIES:
        found += [Variant("triton", d, strategy=s) for d in DEVICES for s in STRATEGIES]
    if op in WITH_WAYS + WITH_THE_SAME:
        found += [Variant("triton", d, strategy=w) for d in DEVICES for w in SCHEDULES]
    if op == "gather_lora_fwd":
        found += [Variant("triton", d, strategy=FUSED) for d in DEVICES]
    return tuple(found)


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    """Every backend on every device, and the choice among them."""
    found = []
    for backend in BACKENDS:
        for device in DEVICES:
            if backend == "native" and device == "cpu":
                found += [Variant(backend, device, isa) for isa in native.isas()]
            else:
                found.append(Variant(backend, device))
    return (*found, *(Variant(DEFAULT, device) for device in DEVICES))


def accepts(op: str, backend: str, args: tuple[Any, ...]) -> bool:
    """Whether the backend has the op and does not refuse these arguments."""
    return backend == DEFAULT or refusal(op, backend, *args) is None


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    """An op's outputs, lists of them in a row."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(t for v in value for t in as_tuple(v))


def bits(t: Tensor) -> Tensor:
    """The tensor's bytes as integers, so that equality tells +0 from -0 and sees NaN."""
    if not t.is_floating_point():
        return t
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
