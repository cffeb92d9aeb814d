"""Registration of the compiled extension's CPU (and CUDA) kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.dispatch import native
from lora_kernels.dispatch.op import NATIVE_NAMESPACE, Implementation
from lora_kernels.dispatch.registry import register
from lora_kernels.ops.common.checks import names

# csrc/include/lora_kernels/nf4_linear_cuda.h
CUDA_TOKENS = 64
# With an empty dimension a kernel has nothing to do: plain torch gives the empty results and zeros.
EMPTY = "takes no layer without inputs, outputs or ranks"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def _missing(op: str, device_type: str) -> str | None:
    reason = native.why_unavailable()
    if reason is not None:
        return f"the extension is not available: {reason}"
    key = _KEYS.get(device_type)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if key is None or not has(f"{NATIVE_NAMESPACE}::{op}", key):
        without = native.why_without_cuda() if key == "CUDA" else None
        return f"the extension has no kernel of this op for {device_type}" + (
            f": {without}" if without else ""
        )
    return None


def refuse_device(op: str, device: torch.device) -> str | None:
    """Why the extension cannot run the op on a device, or None."""
    return _missing(op, device.type)


def refuse_dtypes(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take the tensors' dtypes, or None."""
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"takes {names(DTYPES)}, not {names([t.dtype])}"
    return None


def refuse_linear(op: str, activations: Sequence[Tensor], *parameters: Tensor | None) -> str | None:
    """Why the linear kernels cannot take these activations (x, dy, s) and parameters, or None.

    Which kernel runs is chosen in C++, by dtype, instruction set and shape (csrc/cpu/lora.cpp).
    """
    # Before every call of a small layer: plain loops take half the time of `any` over a generator.
    x = activations[0]
    reason = _missing(op, "cpu" if x.is_cpu else x.device.type)
    if reason is not None:
        return reason
    for t in activations:
        if t.dtype not in DTYPES:
            return refuse_dtypes(t)
        if t.shape[-1] == 0:
            return EMPTY
    for p in parameters:
        if p is None:
            continue
        if p.dtype not in DTYPES:
            return refuse_dtypes(p)
        if p.numel() == 0:
            return EMPTY
        if p.stride(-1) != 1:
            return "takes parameters whose last dimension is contiguous"
    return None


def refuse_cuda_linear(x: Tensor, meta: Sequence[int]) -> str | None:
    """Why the CUDA linear kernels cannot take x and this base, or None; CPU kernels take any."""
    if x.device.type != "cuda":
        return None
    if len(meta) == 2:
        return "takes 4-bit weights on CUDA, not dense ones"
    if x.shape[0] > CUDA_TOKENS:
        return f"takes up to {CUDA_TOKENS} tokens on CUDA, not {x.shape[0]}"
    return None


def register_native(op: str, supports: Callable[[Any], str | None]) -> None:
    """Register `lora_kernels_native::<op>` as the native implementation of an op."""
    overload = getattr(getattr(torch.ops, NATIVE_NAMESPACE), op).default
    register(op, Implementation("native", lambda call: overload(*call), supports))
