"""Fast LoRA and QLoRA kernels for PyTorch."""

from lora_kernels import functional
from lora_kernels.dispatch import explain, use_backend
from lora_kernels.ops.nf4 import NF4Weight

__all__ = ["NF4Weight", "explain", "functional", "use_backend"]
__version__ = "0.1.0"
