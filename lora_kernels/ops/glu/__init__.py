"""Gated linear units: h = act(g) * u."""

from lora_kernels.ops.glu import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.glu import native, reference, triton
from lora_kernels.ops.glu.api import gated_activation

__all__ = ["gated_activation", "native", "reference", "schema", "triton"]
