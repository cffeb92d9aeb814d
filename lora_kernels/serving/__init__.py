"""Many adapters on one model: a pool in bounded memory, and one adapter for each row of a batch."""

from lora_kernels.nn.multi_lora import MultiLoRALinear
from lora_kernels.nn.multi_lora_embedding import MultiLoRAEmbedding
from lora_kernels.serving.attach import attach_pool, attached_pool, detach_pool
from lora_kernels.serving.errors import AdapterInUse, AdapterPoolFull
from lora_kernels.serving.generate import Generated, generate_batch
from lora_kernels.serving.pool import AdapterPool
from lora_kernels.serving.stats import PoolStats

__all__ = [
    "AdapterInUse",
    "AdapterPool",
    "AdapterPoolFull",
    "Generated",
    "MultiLoRAEmbedding",
    "MultiLoRALinear",
    "PoolStats",
    "attach_pool",
    "attached_pool",
    "detach_pool",
    "generate_batch",
]
