"""Every provider, declared once. The order is the order of the tables."""

from __future__ import annotations

import re

from bench.cases import EMBED, GATHER
from bench.providers import layers, ours, peers, plain
from bench.providers.base import BASE, FULL, Outputs, Prepared, Provider

__all__ = ["BASE", "FULL", "PROVIDERS", "Outputs", "Prepared", "Provider", "select"]

_LINEAR = ("nf4_linear", "lora_linear", "nf4_lora_linear")
_LORA = ("lora_linear", "nf4_lora_linear")
_GROUPS = ("lora_packed", "nf4_lora_packed", "lora_mlp")
_QLORA = ("nf4_lora_linear", "nf4_lora_packed")
_ADAPTED = (*_LORA, *_GROUPS, "dora_linear")
_LOSS = ("linear_cross_entropy",)
_BNB = peers.installed("bitsandbytes")

PROVIDERS: tuple[Provider, ...] = (
    layers.provider(),
    ours.provider("native"),
    ours.provider("triton"),
    ours.provider("reference", suites="short"),
    Provider("dense", (*_LINEAR, *_GROUPS, "dora_linear", "gather_lora"), plain.frozen_linear),
    Provider("torch", (*_ADAPTED, "glu", *_LOSS, *GATHER, EMBED), plain.eager),
    Provider("addmm", (*_LORA, *_GROUPS), plain.addmm, plain.addmm_refuses),
    Provider("compile", (*_ADAPTED, "glu", *_LOSS), plain.compiled, suites="long"),
    Provider("peft", _ADAPTED, peers.peft_dense, peers.installed("peft")),
    Provider("peft-mixed", ("gather_lora",), peers.peft_mixed, peers.peft_mixed_refuses),
    Provider("peft+bnb", _QLORA, peers.peft_bnb, peers.peft_bnb_refuses),
    Provider("bnb-base", _QLORA, peers.bnb_base, peers.bnb_base_refuses, suites="models"),
    Provider("bnb-eval", ("nf4_linear",), peers.bnb_eval, peers.bnb_eval_refuses),
    Provider("bnb-train", ("nf4_linear",), peers.bnb_train, _BNB),
    Provider("bnb-dequantize", ("nf4_dequantize",), peers.bnb_dequantize, _BNB),
    Provider("bnb-quantize", ("nf4_quantize",), peers.bnb_quantize, _BNB),
    Provider("torchao", ("nf4_linear",), peers.torchao_nf4, peers.torchao_refuses),
)


# What suite `models` times where none is named: ours as a model calls it, and what users have now.
_MODELS = ("ours:layer", "dense", "peft", "peft+bnb", "bnb-base")


def select(pattern: str | None = None, kind: str = "long") -> list[Provider]:
    """Providers whose name the regular expression matches from its start.

    Args:
        pattern: such as "ours|dense|bnb"; None takes those meant for the kind of suite.
        kind: "short" (minutes at most), "long" or "models".

    Raises:
        ValueError: the pattern leaves nothing.
    """
    if pattern is None:
        if kind == "models":
            return [p for p in PROVIDERS if p.name in _MODELS]
        return [p for p in PROVIDERS if p.suites in ("all", kind)]
    chosen = [p for p in PROVIDERS if re.match(pattern, p.name)]
    if not chosen:
        names = ", ".join(p.name for p in PROVIDERS)
        raise ValueError(f"providers: {pattern!r} matches none of {names}")
    return chosen
