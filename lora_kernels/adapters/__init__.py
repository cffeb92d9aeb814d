"""Adapters on whole models: putting them on, merging them, and PEFT's checkpoint format."""

from lora_kernels.adapters.apply import apply_lora
from lora_kernels.adapters.checkpoint import LoadResult, load_adapter
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.fuse import FusedReport, fuse_projections, unfuse_projections
from lora_kernels.adapters.layers import adapter_layers
from lora_kernels.adapters.merging import (
    disable_adapters,
    merge_adapters,
    merge_and_unload,
    unload,
    unmerge_adapters,
)
from lora_kernels.adapters.quantize import quantize_model
from lora_kernels.adapters.report import LoRAReport, ModelReport, model_report
from lora_kernels.adapters.saving import save_adapter

__all__ = [
    "FusedReport",
    "LoRAConfig",
    "LoRAReport",
    "LoadResult",
    "ModelReport",
    "adapter_layers",
    "apply_lora",
    "disable_adapters",
    "fuse_projections",
    "load_adapter",
    "merge_adapters",
    "merge_and_unload",
    "model_report",
    "quantize_model",
    "save_adapter",
    "unfuse_projections",
    "unload",
    "unmerge_adapters",
]
