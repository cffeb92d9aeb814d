"""dora_linear_fwd by the Triton kernels."""

from __future__ import annotations

from math import ceil

from torch import Tensor

from lora_kernels.ops.common.configs import (
    GEMM_CONFIGS,
    Device,
    GemmConfig,
    best_gemm,
)
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import block_rank
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton.shrink import Projection, shrink
from lora_kernels.ops.common.triton_host import Dropout
from lora_kernels.ops.dora.schema import DoRALinearForward
from lora_kernels.ops.dora.triton.dropout import mask_words
from lora_kernels.ops.dora.triton.linear import gemm

# Of a thread, for two tiles of sums and the operands of one step.
_MAX_PAIR_REGISTERS = 144
# Beside those, the weights that a thread decodes in one step, and the step's length.
_MAX_DECODED, _MAX_DECODED_STEP = 32, 128


def plan_config(
    x: Tensor, w: Weight, n: int, r: int, device: Device, *, dropout: bool, backward: bool
) -> GemmConfig:
    """The tile of the least modelled time, of the device's or else of all of them."""
    m, k = x.shape
    size = x.element_size()
    own = [c for c in GEMM_CONFIGS if _holds(c, size, dropout, backward, w.quantised)]
    for configs in (device.tiles or own, own):
        found = best_gemm(
            max(m, 1),
            max(n, 1),
            max(k, 1),
            device,
            size,
            configs=configs,
            branch=ceil(r / block_rank(r)) * block_rank(r),
            masked_x=dropout and not backward,
            masked_y=dropout,  # the second tile of sums
            quantised=w.quantised,
            tma=w.takes_tma(x),
        )
        if found is not None:
            return found[0]
    raise AssertionError("no tile fits the device")


def _holds(config: GemmConfig, size: int, dropout: bool, backward: bool, quantised: bool) -> bool:
    """Whether a tile's code was seen to spill nothing (`bench resources`).

    With dropout both left operands of a step are made in registers, beside two tiles of sums;
    without addresses (TMA) there is room for 64 columns of them.
    """
    if not dropout:
        return backward or config.block_m != 32
    decoded = config.block_n * config.block_k // (32 * config.warps)
    if quantised and (decoded > _MAX_DECODED or config.block_k > _MAX_DECODED_STEP):
        return False
    operands = 2 * config.block_m * config.block_k * size // (4 * 32 * config.warps)
    sums = config.registers(0, 1)
    return config.tma or sums + operands <= _MAX_PAIR_REGISTERS


def dora_linear_fwd(c: DoRALinearForward) -> tuple[Tensor, Tensor, Tensor]:
    """s = drop(x)·Aᵀ in one pass over x, then y [M, N], and u where kept, in one product."""
    x, a, w = c.x, c.a, Weight(c.base, c.meta)
    m, n, r = x.shape[0], c.meta[0], a.shape[0]
    dropout = Dropout(c.dropout_p, c.seed, 0)
    device = planned_device(x.device)
    s, y = x.new_empty((m, r), dtype=rank_dtype(x.dtype)), x.new_empty((m, n))
    u = x.new_empty((m, n) if c.keep_u else 0)
    shrink(x, [Projection(a.T, s, dropout.keep_scale)], dropout=dropout)
    gemm(
        plan_config(x, w, n, r, device, dropout=dropout.on, backward=False),
        device,
        x,
        w,
        y,
        u if c.keep_u else None,
        s,
        c.b.T,
        magnitude=c.magnitude,
        norm=c.norm,
        row=None,
        mask=mask_words(dropout, x) if dropout.on and n else None,
        bias=c.bias,
        scale=c.scale,
        dropout=dropout,
        backward=False,
    )
    return y, s, u
