"""Many adapters trained in one batch over one frozen base; and transformers' Trainer for one."""

from typing import Any

from lora_kernels.training.attach import detach_adapters
from lora_kernels.training.batch import Batch
from lora_kernels.training.job import AdapterJob
from lora_kernels.training.run import NonFinite
from lora_kernels.training.trainer import MultiLoRATrainer

_OF_TRANSFORMERS = ("AdapterCallback", "AdapterCheckpoints", "AdapterTrainer")

__all__ = ["AdapterJob", "Batch", "MultiLoRATrainer", "NonFinite", "detach_adapters"]
__all__ += list(_OF_TRANSFORMERS)


def __getattr__(name: str) -> Any:
    """Import transformers only when a name that needs it is used."""
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_kernels.training import huggingface

    return getattr(huggingface, name)
