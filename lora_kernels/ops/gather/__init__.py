"""Many adapters in one batch: each token adds its own."""

from lora_kernels.ops.gather import schema  # defines the ops that the others implement

# isort: split
from lora_kernels.ops.gather import native, reference
from lora_kernels.ops.gather.api import Mixture, SlotDropout, gather_lora
from lora_kernels.ops.gather.pages import PAGE, RankPages, page_adapters, pages_of

__all__ = [
    "PAGE",
    "Mixture",
    "RankPages",
    "SlotDropout",
    "gather_lora",
    "native",
    "page_adapters",
    "pages_of",
    "reference",
    "schema",
]
