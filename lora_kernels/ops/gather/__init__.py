"""Many adapters in one batch: each token adds its own."""

# Define the ops that the others implement.
from lora_kernels.ops.gather import embedding_schema, schema

# isort: split
from lora_kernels.ops.gather import (
    embedding_native,
    embedding_reference,
    native,
    reference,
    triton,
)
from lora_kernels.ops.gather.api import Mixture, SlotDropout, gather_lora
from lora_kernels.ops.gather.embedding import gather_lora_embedding, page_embedding_adapters
from lora_kernels.ops.gather.pages import PAGE, RankPages, page_adapters, pages_of

__all__ = [
    "PAGE",
    "Mixture",
    "RankPages",
    "SlotDropout",
    "embedding_native",
    "embedding_reference",
    "embedding_schema",
    "gather_lora",
    "gather_lora_embedding",
    "native",
    "page_adapters",
    "page_embedding_adapters",
    "pages_of",
    "reference",
    "schema",
    "triton",
]
