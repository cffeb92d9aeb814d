"""The stateless API."""

from lora_kernels.ops.cross_entropy import linear_cross_entropy
from lora_kernels.ops.lora import dropout_mask, lora_linear, nf4_lora_linear
from lora_kernels.ops.nf4 import nf4_linear

__all__ = [
    "dropout_mask",
    "linear_cross_entropy",
    "lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
]
