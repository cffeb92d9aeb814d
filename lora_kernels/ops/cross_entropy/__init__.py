"""Cross-entropy over a vocabulary, with the projection to the logits."""

from lora_kernels.ops.cross_entropy import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.cross_entropy import native, reference
from lora_kernels.ops.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy", "native", "reference", "schema"]
