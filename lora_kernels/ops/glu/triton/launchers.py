"""glu_fwd and glu_bwd by the Triton kernels."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.glu.schema import ACTIVATIONS, GLUBackward, GLUForward
from lora_kernels.ops.glu.triton.kernels import _glu_bwd_kernel, _glu_fwd_kernel

_WARPS = 4


def _block(t: Tensor) -> int:
    """16 bytes a thread."""
    return _WARPS * 32 * (16 // t.element_size())


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def glu_fwd(c: GLUForward) -> Tensor:
    """h, of g's shape."""
    g = c.g
    h = _like(g)
    block = _block(g)
    run(
        _glu_fwd_kernel,
        (ceil(g.numel() / block),),
        _WARPS,
        1,
        p_g=g.contiguous(),
        p_u=c.u.contiguous(),
        p_h=h,
        size=g.numel(),
        ACTIVATION=ACTIVATIONS[c.activation],
        BLOCK=block,
    )
    return h


def glu_bwd(c: GLUBackward) -> tuple[Tensor, Tensor, Tensor]:
    """dg, du and, where asked, h, all of g's shape."""
    g = c.g
    dg, du = _like(g), _like(g)
    h = _like(g) if c.need_h else g.new_empty(0)
    block = _block(g)
    run(
        _glu_bwd_kernel,
        (ceil(g.numel() / block),),
        _WARPS,
        1,
        p_dh=c.dh.contiguous(),
        p_g=g.contiguous(),
        p_u=c.u.contiguous(),
        p_dg=dg,
        p_du=du,
        p_h=h if c.need_h else None,
        size=g.numel(),
        ACTIVATION=ACTIVATIONS[c.activation],
        BLOCK=block,
    )
    return dg, du, h
