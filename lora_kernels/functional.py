"""The stateless API."""

from lora_kernels.ops.cross_entropy import linear_cross_entropy
from lora_kernels.ops.dora import dora_linear, weight_norm_squared
from lora_kernels.ops.gather import (
    Mixture,
    RankPages,
    SlotDropout,
    gather_lora,
    gather_lora_embedding,
    page_adapters,
    page_embedding_adapters,
)
from lora_kernels.ops.glu import gated_activation
from lora_kernels.ops.lora import dropout_mask, lora_linear, nf4_lora_linear
from lora_kernels.ops.nf4 import nf4_linear
from lora_kernels.ops.packed import lora_mlp, lora_packed_linear

__all__ = [
    "Mixture",
    "RankPages",
    "SlotDropout",
    "dora_linear",
    "dropout_mask",
    "gated_activation",
    "gather_lora",
    "gather_lora_embedding",
    "linear_cross_entropy",
    "lora_linear",
    "lora_mlp",
    "lora_packed_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "page_adapters",
    "page_embedding_adapters",
    "weight_norm_squared",
]
