"""4-bit base weights: NF4 and FP4 in bitsandbytes' format."""

from lora_kernels.ops.nf4 import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.nf4 import native, reference, triton
from lora_kernels.ops.nf4.api import nf4_linear
from lora_kernels.ops.nf4.weight import NF4Weight

__all__ = ["NF4Weight", "native", "nf4_linear", "reference", "schema", "triton"]
