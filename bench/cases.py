"""What can be measured: layers of real models, and a case of an op on one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = (
    "nf4_quantize",
    "nf4_dequantize",
    "nf4_linear",
    "lora_linear",
    "nf4_lora_linear",
    "lora_packed",
    "nf4_lora_packed",
    "lora_mlp",
    "glu",
    "dora_linear",
    "linear_cross_entropy",
    "gather_lora",
    "gather_lora_add",
    "gather_lora_embed",
    "step",
    "generate",
    "prefill",
)
WHOLE = ("step", "generate", "prefill")  # of a whole model
GATHER = ("gather_lora", "gather_lora_add")
EMBED = "gather_lora_embed"
FWD, BOTH = "fwd", "fwd+bwd"


@dataclass(frozen=True)
class Layer:
    """One linear layer of a real model: w[N, K]."""

    name: str
    n: int
    k: int
    bias: bool = False


def _model(name: str, hidden: int, kv: int, mlp: int, qkv_bias: bool = False) -> dict[str, Layer]:
    shapes = {
        "q_proj": (hidden, hidden, qkv_bias),
        "k_proj": (kv, hidden, qkv_bias),
        "o_proj": (hidden, hidden, False),
        "gate_proj": (mlp, hidden, False),
        "down_proj": (hidden, mlp, False),
    }
    return {f"{name}.{p}": Layer(f"{name}.{p}", n, k, b) for p, (n, k, b) in shapes.items()}


# v_proj has k_proj's shape and up_proj has gate_proj's.
LAYERS: dict[str, Layer] = {
    "square-4096": Layer("square-4096", 4096, 4096),
    **_model("llama-3.1-8b", 4096, 1024, 14336),
    **_model("llama-2-7b", 4096, 4096, 11008),
    **_model("mistral-7b", 4096, 1024, 14336),
    **_model("qwen2.5-0.5b", 896, 128, 4864, qkv_bias=True),
    **_model("qwen2.5-7b", 3584, 512, 18944, qkv_bias=True),
    **_model("llama-3.2-1b", 2048, 512, 8192),
    **_model("smollm2-135m", 576, 192, 1536),
    # An output layer: the vocabulary.
    "smollm2-135m.lm_head": Layer("smollm2-135m.lm_head", 49152, 576),
    # An embedding, as the layer of one-hot rows that it is: k is the vocabulary.
    "smollm2-135m.embed_tokens": Layer("smollm2-135m.embed_tokens", 576, 49152),
    "tiny": Layer("tiny", 96, 128),
    "tiny-bias": Layer("tiny-bias", 64, 64, bias=True),
    **_model("tiny-llama", 64, 32, 128),
}


def _groups(name: str) -> dict[str, tuple[Layer, ...]]:
    q, k, gate, down = (LAYERS[f"{name}.{p}_proj"] for p in ("q", "k", "gate", "down"))
    return {
        f"{name}.qkv": (q, k, k),
        f"{name}.gate_up": (gate, gate),
        f"{name}.mlp": (gate, gate, down),
    }


# mistral-7b's are llama-3.1-8b's.
MODELS = (
    *("llama-3.1-8b", "llama-2-7b", "qwen2.5-0.5b", "qwen2.5-7b", "smollm2-135m", "llama-3.2-1b"),
)
# Layers that are taken together: those that read one x, and a gated MLP (gate, up, down).
GROUPS: dict[str, tuple[Layer, ...]] = {
    **{name: layers for model in MODELS for name, layers in _groups(model).items()},
    "tiny.qkv": (LAYERS["tiny"], *[Layer("tiny.kv", 64, 128, bias=True)] * 2),
    "tiny.mlp": (*[Layer("tiny.gate", 160, 96)] * 2, Layer("tiny.down", 96, 160)),
}
_PACKED = ("qkv", "gate_up")
_GROUPED = {"lora_packed": _PACKED, "nf4_lora_packed": _PACKED, "lora_mlp": ("mlp",)}


@dataclass(frozen=True)
class Model:
    """A Llama beside its layers: heads of queries and of keys, blocks, vocabulary (tied head)."""

    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int


WHOLE_MODELS = {
    "smollm2-135m": Model(30, 9, 3, 49152),
    "llama-3.2-1b": Model(16, 32, 8, 128256),
    "tiny-llama": Model(2, 4, 2, 256),
}
PROMPT = 32  # tokens before those that `generate` makes


@dataclass(frozen=True)
class Case:
    """One measurement: y[M, N] of x[M, K] and w[N, K], with r > 0 where there is an adapter.

    `direction` is "fwd" (no gradients asked, as in inference) or "fwd+bwd": y, then the gradients
    of x and, with an adapter, of A and B (and of DoRA's magnitude). `scale` is the LoRA scale, 2
    throughout. The layer of a cross-entropy is an output layer; its result is the loss, and the
    gradient of x.

    Packed projections and an MLP name a group of layers, each with an adapter. A gated activation
    has no weight: it takes two outputs [M, N] of its layer, a gate projection.

    Many adapters (`gather_lora`; `gather_lora_add` without the base) are those of `adapters` slots
    in turn, token by token, of `loaded` in the pool; `mixed` ranks are 1/4, 3/4, 5/4 and 7/4 of r.
    An embedding's (`gather_lora_embed`) is over its base; x is M ids, which have no gradient, and
    wᵀ its weight.

    Of a whole model (`WHOLE`) the layer is its name and M the new tokens of one greedy sequence,
    the tokens of a prompt, or those of a training step (`bench.step`).

    A quantiser or decoder is timed into a fresh tensor (`fresh`): on a CPU every call takes pages
    that the system has to provide first, as loading a model does, whatever the allocator would
    have recycled.
    """

    op: str
    layer: str
    m: int
    direction: str = FWD
    r: int = 0
    dropout: float = 0.0
    dtype: str = "bf16"
    adapter_dtype: str = "bf16"
    block_size: int = 64
    nested: bool = True
    quant_type: str = "nf4"
    scale: float = 2.0
    adapters: int = 0
    loaded: int = 0
    mixed: bool = False

    def __post_init__(self) -> None:
        expect("op", self.op, OPS)
        kinds = _GROUPED.get(self.op)
        fitting = [g for g in GROUPS if kinds and g.endswith(kinds)]
        whole = [*WHOLE_MODELS, *LAYERS] if self.op in WHOLE else LAYERS
        expect("layer", self.layer, fitting if kinds else whole)
        expect("direction", self.direction, (FWD, BOTH))
        expect("dtype", self.dtype, DTYPES)
        expect("adapter_dtype", self.adapter_dtype, DTYPES)
        if self.m < 0:
            raise ValueError(f"m: got {self.m}, expected 0 or more")
        if self.has_adapter != (self.r > 0):
            raise ValueError(f"r: got {self.r}, which does not fit op {self.op!r}")
        if self.is_gather != (self.loaded > 0) or not 0 <= self.adapters <= self.loaded:
            raise ValueError(
                f"adapters: got {self.adapters} of {self.loaded} loaded, which does not fit op "
                f"{self.op!r}"
            )
        if self.op == "gather_lora_add" and self.backward:
            raise ValueError(f"direction: got {self.direction!r}, expected 'fwd' of {self.op}")
        if self.dropout and not (self.has_adapter and self.direction == BOTH):
            raise ValueError(
                f"dropout: got {self.dropout}, expected 0 without an adapter's training"
            )

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose weights the op reads; of a gated activation the one that it follows; of
        a whole model those of one block."""
        if self.layer in WHOLE_MODELS:
            names = ("q", "k", "k", "o", "gate", "gate", "down")
            return tuple(LAYERS[f"{self.layer}.{name}_proj"] for name in names)
        return GROUPS[self.layer] if self.op in _GROUPED else (LAYERS[self.layer],)

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each output."""
        widths = tuple(layer.n for layer in self.layers)
        return widths[-1:] if self.op == "lora_mlp" else widths

    @property
    def n(self) -> int:
        """The width of all outputs together."""
        return sum(self.widths)

    @property
    def k(self) -> int:
        """The width of x; of a gated activation that of its layer's."""
        return self.layers[0].k

    @property
    def bias(self) -> bool:
        return any(layer.bias for layer in self.layers)

    @property
    def has_adapter(self) -> bool:
        return self.op in (
            *("lora_linear", "nf4_lora_linear", "lora_packed", "nf4_lora_packed", "lora_mlp"),
            "dora_linear",
            *WHOLE,
            *GATHER,
            EMBED,
        )

    @property
    def is_gather(self) -> bool:
        return self.op in (*GATHER, EMBED)

    @property
    def has_weight(self) -> bool:
        return self.op not in ("glu", "gather_lora_add")

    @property
    def is_quantised(self) -> bool:
        return self.op.startswith("nf4")

    @property
    def fresh(self) -> bool:
        return self.op in ("nf4_quantize", "nf4_dequantize")

    @property
    def backward(self) -> bool:
        return self.direction == BOTH

    @property
    def name(self) -> str:
        """Unique and readable: `nf4_lora_linear/fwd+bwd/square-4096/M512/bf16/r16/a-fp32/p0.05`."""
        parts = [self.op]
        if self.op in WHOLE:
            parts += [self.layer, f"M{self.m}"]
        elif self.fresh:
            parts += [self.layer, self.dtype]
        else:
            parts += [self.direction, self.layer, f"M{self.m}", self.dtype]
        if self.has_adapter:
            parts += [f"r{self.r}"]
            parts += [f"a-{self.adapter_dtype}"] if self.adapter_dtype != self.dtype else []
            parts += [f"p{self.dropout:g}"] if self.dropout else []
        if self.is_gather:
            parts += [f"{self.adapters}-of-{self.loaded}"] + ["mixed"] * self.mixed
        if self.is_quantised:
            parts += [self.quant_type] if self.quant_type != "nf4" else []
            parts += [f"b{self.block_size}"] if self.block_size != 64 else []
            parts += ["plain-absmax"] if not self.nested else []
        return "/".join(parts)

    def as_dict(self) -> dict[str, object]:
        return {"case": self.name, **asdict(self), "n": self.n, "k": self.k, "bias": self.bias}


def expect(field: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(allowed)}")
