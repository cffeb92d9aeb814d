"""Several LoRA projections of one input, and the gated MLP made of three."""

from lora_kernels.ops.packed import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.packed import native, reference, triton
from lora_kernels.ops.packed.api import lora_packed_linear
from lora_kernels.ops.packed.mlp import lora_mlp

__all__ = ["lora_mlp", "lora_packed_linear", "native", "reference", "schema", "triton"]
