"""Which implementation of an op runs, and why."""

from lora_kernels.dispatch.op import BACKENDS, BackendError, Explanation, Implementation
from lora_kernels.dispatch.registry import (
    chosen,
    define,
    explain,
    ops,
    register,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "BackendError",
    "Explanation",
    "Implementation",
    "chosen",
    "define",
    "explain",
    "ops",
    "register",
    "use_backend",
]
