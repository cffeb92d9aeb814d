"""Many adapters trained in one batch over one frozen base."""

from lora_kernels.training.attach import detach_adapters
from lora_kernels.training.batch import Batch
from lora_kernels.training.job import AdapterJob
from lora_kernels.training.run import NonFinite
from lora_kernels.training.trainer import MultiLoRATrainer

__all__ = ["AdapterJob", "Batch", "MultiLoRATrainer", "NonFinite", "detach_adapters"]
