"""DoRA: y = m̂ ∘ (x·Wᵀ + scale·x·Aᵀ·Bᵀ) + bias, over a dense or a 4-bit base."""

from lora_kernels.ops.dora import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.dora import native, reference, triton
from lora_kernels.ops.dora.api import dora_linear, dora_norm
from lora_kernels.ops.dora.magnitude import output_scale, weight_norm_squared

__all__ = [
    "dora_linear",
    "dora_norm",
    "native",
    "output_scale",
    "reference",
    "schema",
    "triton",
    "weight_norm_squared",
]
