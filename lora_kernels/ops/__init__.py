"""The op families; importing this defines every op in torch."""

from lora_kernels.ops import cross_entropy, dora, gather, glu, lora, nf4, packed

__all__ = ["cross_entropy", "dora", "gather", "glu", "lora", "nf4", "packed"]
