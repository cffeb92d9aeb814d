"""glu_fwd and glu_bwd by the Triton kernels: one pass over the gate and the input."""

from __future__ import annotations

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_kernels.ops.common.triton.tiles import cast
from lora_kernels.ops.common.triton_host import run
from lora_kernels.ops.glu.schema import ACTIVATIONS, GLUBackward, GLUForward

_WARPS = 4
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _logistic(b_z):
    # 1 / (1 + exp(|z|)) is the smaller of σ(z) and σ(-z): exp never overflows into it.
    b_e = tl.exp(-tl.abs(b_z))
    b_small = tl.math.div_rn(b_e, 1.0 + b_e)
    return tl.where(b_z < 0, b_small, tl.math.div_rn(1.0, 1.0 + b_e))


@triton.jit
def _logistic_slope(b_z):
    """σ(z)·σ(-z), without the difference from 1 that would lose its digits."""
    b_e = tl.exp(-tl.abs(b_z))
    return tl.math.div_rn(b_e, (1.0 + b_e) * (1.0 + b_e))


@triton.jit
def _tanh_argument(b_g):
    """2z: (1 + tanh z) / 2 = σ(2z)."""
    return (b_g + b_g * b_g * b_g * _CUBIC) * _SQRT_2_OVER_PI * 2.0


@triton.jit
def _gate(b_g, ACTIVATION: tl.constexpr):
    """act(g) / g: the share of g that passes."""
    if ACTIVATION == "silu":
        b_share = _logistic(b_g)
    elif ACTIVATION == "gelu":
        b_share = 0.5 * (1.0 + tl.erf(b_g * _SQRT_HALF))
    else:
        b_share = _logistic(_tanh_argument(b_g))
    return b_share


@triton.jit
def _glu_fwd_kernel(p_g, p_u, p_h, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """h = act(g) · u.

    Shapes: g, u and h [size], contiguous. Grid: [cdiv(size, BLOCK)]. In fp32, rounded once.
    """
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    b_g = tl.load(p_g + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK]
    b_u = tl.load(p_u + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK]
    b_h = b_g * _gate(b_g, ACTIVATION) * b_u
    tl.store(p_h + o_i, cast(b_h, p_h.dtype.element_ty), mask=m_i)


@triton.jit
def _glu_bwd_kernel(
    p_dh, p_g, p_u, p_dg, p_du, p_h, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """dg = dh · u · act'(g), du = dh · act(g) and, where h is wanted, h = act(g) · u.

    Shapes: all [size], contiguous. Grid: [cdiv(size, BLOCK)]. In fp32, rounded once.
    """
    o_i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < size
    b_dh = tl.load(p_dh + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK]
    b_g = tl.load(p_g + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK]
    b_u = tl.load(p_u + o_i, mask=m_i, other=0.0).to(tl.float32)  # [BLOCK]
    b_share = _gate(b_g, ACTIVATION)
    if ACTIVATION == "silu":
        b_slope = b_share + b_g * _logistic_slope(b_g)
    elif ACTIVATION == "gelu":
        b_slope = b_share + b_g * _INV_SQRT_2PI * tl.exp(-0.5 * b_g * b_g)
    else:
        b_dz = (1.0 + b_g * b_g * _CUBIC * 3.0) * _SQRT_2_OVER_PI
        b_slope = b_share + 2.0 * b_g * _logistic_slope(_tanh_argument(b_g)) * b_dz
    b_act = b_g * b_share
    tl.store(p_dg + o_i, cast(b_dh * b_u * b_slope, p_dg.dtype.element_ty), mask=m_i)
    tl.store(p_du + o_i, cast(b_dh * b_act, p_du.dtype.element_ty), mask=m_i)
    if p_h is not None:
        tl.store(p_h + o_i, cast(b_act * b_u, p_h.dtype.element_ty), mask=m_i)


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
