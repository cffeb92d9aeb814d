"""dora_norm by the Triton kernels."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.configs import Device
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.strategies import block_rank
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.dora.schema import DoRANorm
from lora_kernels.ops.dora.triton.kernels import _norm_kernel
from lora_kernels.ops.nf4.triton.base import Weight

_WARPS = 4


def dora_norm(c: DoRANorm) -> Tensor:
    """[N] in fp32. The sum itself is squared, so ‖W‖² is of no use: W is read anyway, and nothing
    cancels."""
    a, b, weight = c.a, c.b, Weight(c.base, c.meta)
    w, stride_wn, stride_wk = weight.matrix
    n, k = c.meta[0], c.meta[1]
    r = a.shape[0]
    exact = a.dtype == torch.float32
    # fp32 products are unrolled: small steps of the rank keep the code, and its making, short.
    br = min(block_rank(r), 16) if exact else block_rank(r)
    wide = exact or weight.quantised or w.dtype == torch.float32
    step = 64 if wide else 128
    block = _rows(n, br, planned_device(w.device))
    norm = w.new_empty(n, dtype=torch.float32)
    run(
        _norm_kernel,
        (ceil(n / block),),
        _WARPS,
        3,
        p_w=w,
        p_a=a,
        p_b=b,
        p_out=norm,
        N=n,
        K=k,
        R=r,
        scale=float(c.scale),
        stride_wn=stride_wn,
        stride_wk=stride_wk,
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_bn=b.stride(0),
        stride_br=b.stride(1),
        ONE_RANK=r <= br,
        EVEN_K=k % step == 0,
        BN=block,
        BK=step,
        BR=br,
        **weight.decode_args(step),
    )
    return norm


def _rows(n: int, br: int, device: Device) -> int:
    """Rows of a program: each reads all of A, so many; but half the multiprocessors get one, and
    64 of them beside 64 rank columns spill."""
    block = 64 if br < 64 else 32
    while block > 16 and 2 * ceil(n / block) <= device.multiprocessors:
        block //= 2
    return block
