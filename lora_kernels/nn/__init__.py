"""Modules: a drop-in for nn.Linear with an adapter, and the same over a 4-bit base."""

from lora_kernels.nn.lora import LoRAMixin
from lora_kernels.nn.lora_linear import LoRALinear
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.nn.qlora_linear import QLoRALinear

__all__ = ["LoRALinear", "LoRAMixin", "NF4Linear", "QLoRALinear"]
