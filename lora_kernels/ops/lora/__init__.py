"""y = x·Wᵀ + g ∘ (scale·(d ∘ drop(x)·Aᵀ)·Bᵀ) + bias, over a dense or a 4-bit base."""

from lora_kernels.ops.lora import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.lora import native, reference, triton
from lora_kernels.ops.lora.api import dropout_mask, lora_linear, nf4_lora_linear

__all__ = [
    "dropout_mask",
    "lora_linear",
    "native",
    "nf4_lora_linear",
    "reference",
    "schema",
    "triton",
]
