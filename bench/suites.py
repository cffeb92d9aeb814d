"""What is measured: every case is declared here, once, and belongs to named suites."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from bench.cases import BOTH, EMBED, FWD, GATHER, LAYERS, MODELS, Case, expect
from bench.model_suite import ANY, Choice, models, tiny


def _targets() -> Iterator[Case]:
    """The cases that this package promises figures for, and no others."""
    square = "square-4096"
    for m in (1, 8, 32, 512, 2048):
        yield Case("nf4_linear", square, m)
    for m in (512, 2048):
        yield Case("nf4_linear", square, m, BOTH)
    for p, adapter in itertools.product((0.0, 0.05), ("bf16", "fp32")):
        yield Case("lora_linear", square, 2048, BOTH, 16, p, adapter_dtype=adapter)
    for m, adapter in itertools.product((512, 2048), ("bf16", "fp32")):
        yield Case("nf4_lora_linear", square, m, BOTH, 16, 0.05, adapter_dtype=adapter)
    yield Case("nf4_dequantize", square, 0)
    yield Case("nf4_quantize", square, 0)
    for r, loaded, mixed in ((16, 64, False), (16, 1000, False), (32, 64, False), (32, 64, True)):
        yield Case("gather_lora_add", square, 64, FWD, r, adapters=64, loaded=loaded, mixed=mixed)
    for layer in (square, "smollm2-135m.gate_proj"):
        yield Case("gather_lora", layer, 64, FWD, 16, adapters=64, loaded=64)
    yield Case("gather_lora", square, 512, FWD, 16, adapters=4, loaded=4)
    yield Case("gather_lora", square, 64, FWD, 16, adapters=0, loaded=64)
    yield STEP


# A whole optimiser step of the demo's model: batch 4 x 256 tokens, every linear layer adapted.
# The layer only names the model.
STEP = Case("step", "smollm2-135m.q_proj", 1024, BOTH, 16, 0.05, adapter_dtype="fp32")


def _quick() -> Iterator[Case]:
    """A few minutes: one case for each regime, on two real layers."""
    for m in (1, 32, 512):
        yield Case("nf4_linear", "qwen2.5-7b.k_proj", m)
    yield Case("nf4_linear", "llama-3.1-8b.k_proj", 512, BOTH)
    yield Case("lora_linear", "llama-3.1-8b.k_proj", 512, BOTH, 16)
    yield Case("lora_linear", "llama-3.1-8b.k_proj", 512, BOTH, 16, 0.05)
    yield Case("nf4_lora_linear", "llama-3.1-8b.k_proj", 512, BOTH, 16, 0.05)
    yield Case("linear_cross_entropy", "smollm2-135m.lm_head", 512, BOTH)
    yield Case("nf4_dequantize", "llama-3.1-8b.k_proj", 0)
    yield Case("nf4_quantize", "llama-3.1-8b.k_proj", 0)


def _smoke() -> Iterator[Case]:
    """Seconds, on shapes that mean nothing: for tests of the harness itself."""
    yield Case("nf4_linear", "tiny", 3)
    yield Case("nf4_linear", "tiny-bias", 5, BOTH, dtype="fp32")
    yield Case("lora_linear", "tiny", 7, BOTH, 4, adapter_dtype="fp32")
    yield Case("lora_linear", "tiny-bias", 7, BOTH, 8, 0.25, dtype="fp32", adapter_dtype="fp32")
    yield Case("nf4_lora_linear", "tiny", 9, BOTH, 8, 0.25)
    yield Case("nf4_lora_linear", "tiny", 2, FWD, 8, nested=False)
    yield Case("lora_packed", "tiny.qkv", 9, BOTH, 8, 0.25, adapter_dtype="fp32")
    yield Case("nf4_lora_packed", "tiny.qkv", 9, BOTH, 8, 0.25, adapter_dtype="fp32")
    yield Case("lora_mlp", "tiny.mlp", 9, BOTH, 4, 0.25)
    yield Case("glu", "tiny", 7, BOTH)
    yield Case("dora_linear", "tiny-bias", 9, BOTH, 8, 0.25, adapter_dtype="fp32")
    yield Case("linear_cross_entropy", "tiny", 6, BOTH)
    yield Case("linear_cross_entropy", "tiny", 5, dtype="fp32")
    yield Case("nf4_dequantize", "tiny", 0)
    yield Case("nf4_quantize", "tiny", 0, dtype="fp32")
    yield Case("gather_lora", "tiny", 9, BOTH, 8, adapters=3, loaded=5, mixed=True)
    yield Case("gather_lora_add", "tiny", 6, FWD, 4, adapters=6, loaded=6)
    for direction in (FWD, BOTH):
        yield Case(EMBED, "tiny", 9, direction, 8, adapters=3, loaded=5, mixed=True)


def _scaling() -> Iterator[Case]:
    """Curves over M and over r on one square layer, for `plot`."""
    square = "square-4096"
    for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        yield Case("nf4_linear", square, m)
    for m in (128, 512, 2048, 8192):
        yield Case("lora_linear", square, m, BOTH, 16)
        yield Case("nf4_lora_linear", square, m, BOTH, 16)
    for r in (8, 16, 32, 64, 128, 256):
        yield Case("lora_linear", square, 2048, BOTH, r)
        yield Case("nf4_lora_linear", square, 2048, BOTH, r)


def _layers() -> Iterator[Case]:
    """Every op on every distinct layer of the models, and those that a model takes together, at one
    token, a small batch and a training batch."""
    seen: set[tuple[int, int, bool]] = set()
    for layer in LAYERS.values():
        if layer.name.endswith("lm_head"):
            for direction in (FWD, BOTH):
                yield Case("linear_cross_entropy", layer.name, 1024, direction)
            continue
        shape = (layer.n, layer.k, layer.bias)
        if shape in seen or layer.name.startswith("tiny") or layer.name.endswith("embed_tokens"):
            continue
        seen.add(shape)
        for m in (1, 8, 32, 512, 2048):
            yield Case("nf4_linear", layer.name, m)
        yield Case("nf4_linear", layer.name, 512, BOTH)
        for m in (1, 32):
            yield Case("lora_linear", layer.name, m, FWD, 16)
            yield Case("nf4_lora_linear", layer.name, m, FWD, 16)
        for m, p in itertools.product((512, 2048), (0.0, 0.05)):
            yield Case("lora_linear", layer.name, m, BOTH, 16, p)
            yield Case("nf4_lora_linear", layer.name, m, BOTH, 16, p)
        yield Case("nf4_dequantize", layer.name, 0)
        yield Case("nf4_quantize", layer.name, 0)
    for model in MODELS:
        yield from _families(model)


def _families(model: str) -> Iterator[Case]:
    """Packed projections, the MLP and its gate, and DoRA: one token, and a training batch."""
    q, gate = f"{model}.q_proj", f"{model}.gate_proj"
    groups = ("lora_packed", "qkv"), ("lora_packed", "gate_up"), ("lora_mlp", "mlp")
    layers = [(op, f"{model}.{group}") for op, group in groups] + [("dora_linear", q)]
    for op, layer in layers:
        for m in (1, 32):
            yield Case(op, layer, m, FWD, 16)
        for p in (0.0, 0.05):
            yield Case(op, layer, 512, BOTH, 16, p)
    for direction in (FWD, BOTH):
        yield Case("glu", gate, 512, direction)


def _lora() -> Iterator[Case]:
    """Every op over dense weights that Triton has kernels for, at the sizes of a large GPU: `run
    --device cuda --suite lora`. One to 8192 tokens; training batches with PEFT's fp32 adapters too.
    """
    model = "llama-3.1-8b"
    ones = ("square-4096", f"{model}.k_proj", f"{model}.gate_proj")
    layers = [(op, layer) for op in ("lora_linear", "dora_linear") for layer in ones]
    layers += [("lora_packed", f"{model}.qkv"), ("lora_packed", f"{model}.gate_up")]
    layers += [("lora_mlp", f"{model}.mlp")]
    for op, layer in layers:
        for m, r in itertools.product((1, 16, 2048, 8192), (16, 64)):
            yield Case(op, layer, m, FWD, r)
        for m in (1, 16):
            yield Case(op, layer, m, BOTH, 16)
        for m, r, p in itertools.product((2048, 8192), (16, 64), (0.0, 0.05)):
            yield Case(op, layer, m, BOTH, r, p)
        yield Case(op, layer, 2048, BOTH, 16, 0.05, adapter_dtype="fp32")
    for m, direction in itertools.product((1, 16, 2048, 8192), (FWD, BOTH)):
        yield Case("glu", f"{model}.gate_proj", m, direction)


def _nf4() -> Iterator[Case]:
    """The same of 4-bit weights, with bitsandbytes as the peer: `run --device cuda --suite nf4`."""
    for layer in ("square-4096", "llama-3.1-8b.k_proj", "llama-3.1-8b.down_proj"):
        for op in ("nf4_quantize", "nf4_dequantize"):
            yield Case(op, layer, 0)
        for m in (1, 4, 8, 16, 64, 512, 2048, 8192):
            yield Case("nf4_linear", layer, m)
            yield Case("nf4_lora_linear", layer, m, FWD, 16)
        for m in (64, 2048, 8192):
            yield Case("nf4_linear", layer, m, BOTH)
            for p in (0.0, 0.05):
                yield Case("nf4_lora_linear", layer, m, BOTH, 16, p)
        yield Case("nf4_linear", layer, 1, nested=False)


def _gather() -> Iterator[Case]:
    """Serving many adapters: decode with one each, real ranks, prefill, no adapter at all, and a
    pool of up to a thousand; then training. On a GPU: `run --device cuda --suite gather`."""
    for layer in ("square-4096", "smollm2-135m.gate_proj"):
        for op in GATHER:
            for count in (1, 8, 64):
                yield Case(op, layer, 64, FWD, 16, adapters=count, loaded=64)
            for mixed in (False, True):
                yield Case(op, layer, 64, FWD, 32, adapters=64, loaded=64, mixed=mixed)
            yield Case(op, layer, 64, FWD, 16, adapters=64, loaded=1000)
            yield Case(op, layer, 512, FWD, 16, adapters=4, loaded=4)
        yield Case("gather_lora", layer, 64, FWD, 16, adapters=0, loaded=64)
        yield Case("gather_lora", layer, 512, BOTH, 16, adapters=8, loaded=8, adapter_dtype="fp32")
    tokens = "smollm2-135m.embed_tokens"
    for m, count in itertools.product((64, 512), (8, 64)):
        yield Case(EMBED, tokens, m, FWD, 16, adapters=count, loaded=64)
    yield Case(EMBED, tokens, 512, BOTH, 16, adapters=8, loaded=8, adapter_dtype="fp32")


def _gpu(tiny: bool = False) -> Iterator[Case]:
    """What one GPU is asked in two minutes: each family on the layers of an 8B model, from one
    token to a training batch. `tiny` is the same on shapes that mean nothing, to try it anywhere.
    """
    model = "llama-3.1-8b"
    kv, gate = ("tiny", "tiny") if tiny else (f"{model}.k_proj", f"{model}.gate_proj")
    square, group = ("tiny", "tiny") if tiny else ("square-4096", model)
    qkv, mlp = f"{group}.qkv", f"{group}.mlp"
    few, some, many, most = (2, 3, 5, 7) if tiny else (16, 512, 2048, 8192)
    pool = 8 if tiny else 64
    # What matters most stands first: a run may be cut.
    for p in (0.0, 0.05):
        yield Case("lora_linear", square, most, BOTH, 16, p)
    yield Case("nf4_lora_linear", square, many, BOTH, 16, 0.05)
    yield Case("nf4_linear", square, 1)
    yield Case("lora_linear", square, 1, FWD, 16)
    yield Case("dora_linear", square, many, BOTH, 16, 0.05)
    yield Case("lora_packed", qkv, many, BOTH, 16, 0.05)
    yield Case("lora_mlp", mlp, some, BOTH, 16)
    yield Case("gather_lora", square, pool, FWD, 16, adapters=pool, loaded=pool)
    yield Case("lora_linear", kv, many, BOTH, 16, 0.05, adapter_dtype="fp32")
    yield Case("nf4_lora_linear", square, most, BOTH, 16)
    yield Case("nf4_lora_linear", square, 1, FWD, 16)
    for m in (few, most):
        yield Case("lora_linear", square, m, FWD, 16)
    for m in (few, many):
        yield Case("nf4_linear", square, m)
    yield Case("nf4_linear", square, most, BOTH)
    yield Case("glu", gate, many, BOTH)
    yield Case("dora_linear", square, many, BOTH, 16)
    yield Case("lora_packed", qkv, 1, FWD, 16)
    yield Case("lora_linear", gate, many, BOTH, 16)
    yield Case("gather_lora", square, some, FWD, 16, adapters=2, loaded=4)
    yield Case("nf4_dequantize", gate, 0)
    yield Case("nf4_quantize", gate, 0)


def _gpu_tiny() -> Iterator[Case]:
    return _gpu(tiny=True)


def _full() -> Iterator[Case]:
    """All but the smoke cases and the GPU's, and the other dtypes and storage options."""
    yield from _targets()
    yield from _scaling()
    yield from _layers()
    yield from models()
    yield from _gather()
    for dtype in ("fp16", "fp32"):
        for m in (1, 512):
            yield Case("nf4_linear", "square-4096", m, dtype=dtype)
        yield Case("nf4_lora_linear", "square-4096", 512, BOTH, 16, 0.05, dtype, "fp32")
        yield Case("lora_linear", "square-4096", 512, BOTH, 16, 0.05, dtype, "fp32")
        yield Case("dora_linear", "square-4096", 512, BOTH, 16, 0.05, dtype, "fp32")
        yield Case("lora_packed", "llama-3.1-8b.qkv", 512, BOTH, 16, 0.05, dtype, "fp32")
        yield Case("lora_mlp", "qwen2.5-0.5b.mlp", 512, BOTH, 16, 0.05, dtype, "fp32")
        yield Case("glu", "llama-3.1-8b.gate_proj", 512, BOTH, dtype=dtype)
    for change in ({"nested": False}, {"block_size": 128}, {"quant_type": "fp4"}):
        yield replace(Case("nf4_linear", "square-4096", 1), **change)  # type: ignore[arg-type]
        yield replace(Case("nf4_linear", "square-4096", 512), **change)  # type: ignore[arg-type]


_SUITES = {
    "smoke": _smoke,
    "quick": _quick,
    "targets": _targets,
    "scaling": _scaling,
    "layers": _layers,
    "models": models,
    "models-tiny": tiny,
    "lora": _lora,
    "nf4": _nf4,
    "gather": _gather,
    "gpu": _gpu,
    "gpu-tiny": _gpu_tiny,
    "full": _full,
}
SUITES = tuple(_SUITES)
SHORT = ("smoke", "quick", "gpu-tiny")  # minutes at most
TINY = ("smoke", "gpu-tiny", "models-tiny")  # shapes that mean nothing


def kind(name: str) -> str:
    """Which providers a suite takes unasked (`bench.providers.select`)."""
    return "models" if name.startswith("models") else "short" if name in SHORT else "long"


def suite(name: str, only: str | None = None, choice: Choice = ANY) -> list[Case]:
    """The cases of a suite in order, each once; `only` is a regular expression over case names.

    Raises:
        ValueError: no such suite, or `only` or the choice leaves nothing.
    """
    expect("suite", name, SUITES)
    cases = choice.of(list({c.name: c for c in _SUITES[name]()}.values()))
    if only is None:
        return cases
    kept = [c for c in cases if re.search(only, c.name)]
    if not kept:
        names = "\n  ".join(c.name for c in cases)
        raise ValueError(f"only: {only!r} matches no case of suite {name!r}, which has\n  {names}")
    return kept
