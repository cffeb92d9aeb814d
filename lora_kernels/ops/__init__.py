"""The op families; importing this defines every op in torch."""

from lora_kernels.ops import cross_entropy, lora, nf4

__all__ = ["cross_entropy", "lora", "nf4"]
