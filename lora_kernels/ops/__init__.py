"""The op families; importing this defines every op in torch."""

from lora_kernels.ops import lora, nf4

__all__ = ["lora", "nf4"]
