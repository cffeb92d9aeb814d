"""lora_packed_fwd by the Triton kernels: x is read once for every three projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from torch import Tensor

from lora_kernels.ops.common.configs import GemmConfig, thin_rows
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.strategies import Problem, choose
from lora_kernels.ops.common.triton_host import (
    Dropout,
    descriptor,
    precision,
    run,
    stride,
    takes_tma,
)
from lora_kernels.ops.packed.schema import rank_slices
from lora_kernels.ops.packed.triton.gemm import _packed_forward_kernel
from lora_kernels.ops.packed.triton.thin import _packed_shrink_kernel

PER_LAUNCH = 3  # projections


def groups(count: int) -> Iterator[range]:
    """The projections of each launch."""
    for first in range(0, count, PER_LAUNCH):
        yield range(first, min(first + PER_LAUNCH, count))


def numbered(values: Sequence[dict[str, object]], absent: dict[str, object]) -> dict[str, object]:
    """Arguments of each projection as the kernels name them: name_0, name_1, name_2."""
    slots = [*values, *([absent] * (PER_LAUNCH - len(values)))]
    return {f"{name}_{i}": v for i, slot in enumerate(slots) for name, v in slot.items()}


def plan_config(
    op: str, rows: Sequence[Tensor], weights: Sequence[Tensor], r: int, dropout: bool
) -> tuple[str, GemmConfig]:
    """Strategy and tile: the cost model's for one layer with all projections side by side.

    There is no vendor product to add to, so where that is the cheapest the better of the other two
    is taken.
    """
    x = rows[0]
    n, k = sum(w.shape[0] for w in weights), weights[0].shape[1]
    tma = takes_tma(*rows, *weights)
    problem = Problem(x.shape[0], n, k, r, x.dtype, dropout, tma, projections=len(weights))
    plan = choose(op, problem, planned_device(x.device), without="addmm")
    assert plan.config is not None
    return plan.strategy, plan.config


def lora_packed_fwd(
    x: Tensor,
    base: Sequence[Tensor],
    meta: Sequence[int],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    bias: Sequence[Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """y_i [M, N_i] and s [M, Σ R_i]."""
    m = x.shape[0]
    columns = list(rank_slices(a))
    s = x.new_empty((m, columns[-1].stop))
    y = [x.new_empty((m, w.shape[0])) for w in base]
    for group in groups(len(a)):
        first = group.start
        dropout = Dropout(dropout_p, seed, first)
        part = slice(group.start, group.stop)
        own = s[:, columns[first].start : columns[group[-1]].stop]
        r = max(t.shape[0] for t in a[part])
        strategy, config = plan_config("lora_linear_fwd", [x], base[part], r, dropout.on)
        single_pass = strategy == "single_pass" and all(t.numel() > 0 for t in y[part])
        if not single_pass:
            shrink(x, a[part], own, dropout)
        project(
            x, base[part], y[part], own, a[part], b[part], bias[part], scales[part], dropout,
            config, single_pass,
        )  # fmt: skip
    return y, s


def shrink(x: Tensor, a: Sequence[Tensor], s: Tensor, dropout: Dropout) -> None:
    """The s_i side by side, in one pass over x."""
    m, k = x.shape
    size = x.element_size()
    br = Problem(m, 1, k, max(t.shape[0] for t in a)).block_r
    config = thin_rows(m, k, planned_device(x.device), br, size)
    step = min(config.step, 64)  # three partners are in flight with x
    run(
        _packed_shrink_kernel,
        (ceil(m / config.block), ceil(max(t.shape[0] for t in a) / br)),
        config.warps,
        min(config.stages, 3),
        p_x=x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        DROPOUT=dropout.on,
        PRECISION=precision(x.dtype),
        BM=config.block,
        BK=step,
        BR=br,
        **numbered(
            [
                {"p_q": t, "R": t.shape[0], "stride_qk": t.stride(1), "stride_qr": t.stride(0)}
                for t in a
            ],
            {"p_q": None, "R": 0, "stride_qk": 0, "stride_qr": 0},
        ),
    )


def project(
    x: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    s: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    scales: Sequence[float],
    dropout: Dropout,
    config: GemmConfig,
    single_pass: bool,
) -> None:
    """Every y_i in one launch; s is made there where single_pass, and read otherwise."""
    m, k = x.shape
    device = planned_device(x.device)
    tiles = ceil(m / config.block_m) * sum(ceil(t.shape[1] / config.block_n) for t in y)
    programs = min(tiles, device.multiprocessors) if config.tma else tiles
    box = [config.block_n, config.block_k]
    run(
        _packed_forward_kernel,
        (programs,),
        config.warps,
        config.stages,
        x=descriptor(x, [config.block_m, config.block_k]) if config.tma else x,
        p_s=s,
        p_seed=dropout.seed,
        M=m,
        K=k,
        keep_scale=dropout.keep_scale,
        threshold=dropout.threshold,
        first_stream=dropout.stream,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_sm=s.stride(0),
        programs=programs,
        SINGLE_PASS=single_pass,
        DROPOUT=dropout.on,
        TMA=config.tma,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(x.dtype),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BR=Problem(m, 1, k, max(t.shape[0] for t in a)).block_r,
        GROUP=config.group,
        **numbered(
            [
                {
                    "w": descriptor(w, box) if config.tma else w,
                    "p_y": y[i],
                    "p_q": a[i],
                    "p_u": b[i],
                    "p_bias": bias[i],
                    "N": w.shape[0],
                    "R": a[i].shape[0],
                    "scale": float(scales[i]),
                    "stride_wk": w.stride(1),
                    "stride_wn": w.stride(0),
                    "stride_qk": a[i].stride(1),
                    "stride_qr": a[i].stride(0),
                    "stride_ur": b[i].stride(1),
                    "stride_un": b[i].stride(0),
                    "stride_bias": stride(bias[i]),
                }
                for i, w in enumerate(weights)
            ],
            {
                **dict.fromkeys(("w", "p_y", "p_q", "p_u", "p_bias")),
                **dict.fromkeys(("N", "R", "stride_wk", "stride_wn", "stride_qk", "stride_qr"), 0),
                **dict.fromkeys(("stride_ur", "stride_un", "stride_bias"), 0),
                "scale": 0.0,
            },
        ),
    )
