"""Fast LoRA and QLoRA kernels for PyTorch."""

from lora_kernels import functional, serving, training
from lora_kernels.adapters import (
    LoRAConfig,
    LoRAReport,
    apply_lora,
    disable_adapters,
    fuse_projections,
    load_adapter,
    merge_adapters,
    merge_and_unload,
    model_report,
    quantize_model,
    save_adapter,
    unfuse_projections,
    unload,
    unmerge_adapters,
)
from lora_kernels.dispatch import explain, installed, use_backend
from lora_kernels.integrations.decoding import compile_decoding, uncompile_decoding
from lora_kernels.integrations.fused_loss import fuse_loss
from lora_kernels.nn import LoRAGateUp, LoRALinear, LoRAMLP, LoRAQKV, NF4Linear, QLoRALinear
from lora_kernels.ops.nf4 import NF4Weight

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig",
    "LoRAGateUp",
    "LoRALinear",
    "LoRAMLP",
    "LoRAQKV",
    "LoRAReport",
    "NF4Linear",
    "NF4Weight",
    "QLoRALinear",
    "apply_lora",
    "compile_decoding",
    "disable_adapters",
    "explain",
    "functional",
    "fuse_loss",
    "fuse_projections",
    "load_adapter",
    "merge_adapters",
    "merge_and_unload",
    "model_report",
    "quantize_model",
    "save_adapter",
    "serving",
    "training",
    "uncompile_decoding",
    "unfuse_projections",
    "unload",
    "unmerge_adapters",
    "use_backend",
]

installed.warn()
