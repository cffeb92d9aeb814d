"""Modules: linear layers with an adapter, over a dense or a 4-bit base, and several run as one."""

from lora_kernels.nn.lora import LoRAMixin
from lora_kernels.nn.lora_linear import LoRALinear
from lora_kernels.nn.nf4_linear import NF4Linear
from lora_kernels.nn.packed import LoRAGateUp, LoRAMLP, LoRAQKV
from lora_kernels.nn.qlora_linear import QLoRALinear

__all__ = [
    "LoRAGateUp",
    "LoRALinear",
    "LoRAMLP",
    "LoRAMixin",
    "LoRAQKV",
    "NF4Linear",
    "QLoRALinear",
]
