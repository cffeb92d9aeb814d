"""Suite `models`: the layers of real models at the sizes that they run at, and whole models.

fp32 adapters of rank 16 on bf16 layers, as PEFT and this package make them; training drops 5 %.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from bench.cases import BOTH, FWD, Case
from bench.cases import WHOLE as WHOLE_OPS

SUITE_MODELS = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b")
PROJECTIONS = ("q_proj", "k_proj", "gate_proj", "down_proj")  # o, v and up have a shape of these
PACKED = ("qkv", "gate_up")
TOKENS = (1, 8, 64, 512, 2048)
WHOLE = ("smollm2-135m", "llama-3.2-1b")
NEW, PREFILL, TRAINED = 64, 512, 1024
R, DROPOUT = 16, 0.05
LAYER_KINDS = {
    "lora": ("lora_linear",),
    "qlora": ("nf4_lora_linear",),
    "packed": ("lora_packed", "nf4_lora_packed"),
}
KINDS = {**LAYER_KINDS, **{op: (op,) for op in ("generate", "prefill", "step")}}


def layer_case(op: str, layer: str, m: int, direction: str, r: int = R) -> Case:
    """A layer of the suite; it drops where it trains."""
    return Case(op, layer, m, direction, r, DROPOUT * (direction == BOTH), adapter_dtype="fp32")


def whole_case(op: str, model: str, m: int, r: int = R) -> Case:
    """A whole model; only a training step has gradients and dropout."""
    return layer_case(op, model, m, BOTH if op == "step" else FWD, r)


def models() -> Iterator[Case]:
    """Model by model, the layers and then the whole of it."""
    for model in SUITE_MODELS:
        for direction, m in itertools.product((FWD, BOTH), TOKENS):
            for op, layer in itertools.product(("lora_linear", "nf4_lora_linear"), PROJECTIONS):
                yield layer_case(op, f"{model}.{layer}", m, direction)
            for op, layer in itertools.product(KINDS["packed"], PACKED):
                yield layer_case(op, f"{model}.{layer}", m, direction)
        if model in WHOLE:
            for op, m in (("generate", NEW), ("prefill", PREFILL), ("step", TRAINED)):
                yield whole_case(op, model, m)


def tiny() -> Iterator[Case]:
    """The same on shapes that mean nothing, in seconds: no line of it runs first in a long run."""
    for direction in (FWD, BOTH):
        for op in ("lora_linear", "nf4_lora_linear"):
            yield layer_case(op, "tiny", 3, direction, 4)
        for op in KINDS["packed"]:
            yield layer_case(op, "tiny.qkv", 3, direction, 4)
    for op, m in (("generate", 4), ("prefill", 9), ("step", 32)):
        yield whole_case(op, "tiny-llama", m, 4)


@dataclass(frozen=True)
class Choice:
    """Which cases of a suite; of an empty field all."""

    model: Sequence[str] = ()
    layer: Sequence[str] = ()
    tokens: Sequence[int] = ()
    kind: Sequence[str] = ()
    direction: Sequence[str] = ()

    def of(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the cases that fit.

        Raises:
            ValueError: none does, or none has one of the values.
        """
        kept = list(cases)
        for f in fields(self):
            wanted = getattr(self, f.name)
            if not wanted:
                continue
            has = {v for case in cases for v in _values(case, f.name)}
            if unknown := [str(v) for v in wanted if v not in has]:
                raise ValueError(
                    f"--{f.name}: got {', '.join(unknown)}, and the suite has "
                    f"{', '.join(sorted(map(str, has)))}"
                )
            kept = [case for case in kept if set(wanted) & _values(case, f.name)]
        if not kept:
            given = {f.name: v for f in fields(self) if (v := getattr(self, f.name))}
            raise ValueError(f"no case of the suite fits all of {given}")
        return kept


ANY = Choice()


def _values(case: Case, field: str) -> set[object]:
    """What a case has of a field of `Choice`."""
    if field == "kind":
        return {name for name, ops in KINDS.items() if case.op in ops}
    if case.op in WHOLE_OPS:
        model, layer = case.layer, ""
    else:
        model, _, layer = case.layer.rpartition(".")
    return {{"model": model, "layer": layer, "tokens": case.m, "direction": case.direction}[field]}
