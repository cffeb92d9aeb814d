"""Inputs for every op, by name: the parity and contract tests find them through the registry.

A new op adds one generator to `GENERATORS`. A case holds the op's positional arguments on the CPU;
`Case.build` makes the same values every time, on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from lora_kernels.ops.common.rank import rank_value
from lora_kernels.ops.nf4.double_quant import dynamic_map
from tests.ops.case import (
    ANY,
    BASES,
    DTYPES,
    RANGES,
    WIDE_BASES,
    WIDE_SHAPES,
    Case,
    Range,
    Source,
    dtype_name,
    size_name,
    strided,
)
from tests.ops.cross_entropy_inputs import cross_entropy, linear_cross_entropy
from tests.ops.dora_inputs import dora_linear_bwd, dora_linear_fwd, dora_norm
from tests.ops.gather_embedding_inputs import (
    gather_lora_embed_add,
    gather_lora_embed_bwd,
    gather_lora_embed_fwd,
)
from tests.ops.gather_inputs import gather_lora_add, gather_lora_bwd, gather_lora_fwd
from tests.ops.glu_inputs import glu_bwd, glu_fwd
from tests.ops.packed_inputs import lora_packed_bwd, lora_packed_fwd

# M, N, K, R: nothing divides anything, single rows and columns, no rows, outputs or inputs at all.
SHAPES = (
    (1, 64, 128, 16),
    (3, 7, 31, 3),
    (17, 48, 96, 8),
    (33, 129, 257, 17),
    (64, 1, 40, 1),
    (130, 65, 64, 33),
    (5, 33, 1, 2),
    (0, 16, 24, 4),
    (5, 0, 24, 4),
    (5, 16, 0, 4),
)
SMALL = (5, 12, 20, 3)

# --- NF4 ------------------------------------------------------------------------------------------


def _nf4_quantize() -> Iterator[Case]:
    sizes = {"1": (1,), "odd": (7, 31), "3d": (3, 5, 64), "short-last-block": (33, 100)}
    for dtype, (label, size), quant_type in itertools.product(DTYPES, sizes.items(), (0, 1)):
        yield Case(
            "nf4_quantize",
            f"{dtype_name(dtype)}-{label}-type{quant_type}",
            lambda r, d=dtype, s=size, q=quant_type: (r.normal(*s, dtype=d), 64, q),
            exact=True,
            core=label == "odd" and quant_type == 0,
        )
    for block_size in (32, 128, 256, 512, 1024, 2048, 4096):
        yield Case(
            "nf4_quantize",
            f"block{block_size}",
            lambda r, b=block_size: (r.normal(3 * b + 5), b, 0),
            exact=True,
        )
    yield Case("nf4_quantize", "empty", lambda r: (r.normal(0, 8), 64, 0), exact=True, core=True)
    yield Case(
        "nf4_quantize", "zeros", lambda r: (torch.zeros(3, 50), 32, 0), exact=True, core=True
    )
    # Scales below 1e-38, where 1 / absmax would overflow.
    yield Case("nf4_quantize", "subnormal", lambda r: (r.normal(5, 64) * 1e-40, 64, 0), exact=True)


def _nf4_quantize_scales() -> Iterator[Case]:
    def make(r: Source, scales: Callable[[Source], Tensor], block: int) -> tuple[Any, ...]:
        absmax = scales(r)
        return absmax, dynamic_map().clone(), absmax.mean().reshape(1), block

    kinds: dict[str, Callable[[Source], Tensor]] = {
        "one": lambda r: r.normal(1).abs(),
        "short": lambda r: r.normal(100).abs(),
        "several": lambda r: r.normal(1200).abs(),
        "narrow": lambda r: 1 + r.normal(777) * 1e-6,
        "subnormal": lambda r: r.normal(300).abs() * 1e-40,
        "huge": lambda r: r.normal(300).abs().clamp(max=3) * 1e36,
        "equal": lambda r: torch.full((512,), 0.25),
        "one-differs": lambda r: torch.full((512,), 0.25).index_fill(0, torch.tensor(7), 9.0),
        "zeros": lambda r: torch.zeros(300),
    }
    for (name, scales), block in itertools.product(kinds.items(), (256, 64, 7)):
        yield Case(
            "nf4_quantize_scales",
            f"{name}-block{block}",
            lambda r, s=scales, b=block: make(r, s, b),
            exact=True,
            core=block == 256 and name in ("one", "several", "equal"),
        )
    yield Case(  # every point of the grid that values are rounded to, and a map of another range
        "nf4_quantize_scales",
        "grid",
        lambda r: (torch.linspace(-1, 1, 140001), dynamic_map() * 0.7, torch.zeros(1), 1 << 20),
        exact=True,
    )
    yield Case(
        "nf4_quantize_scales",
        "empty",
        lambda r: (torch.empty(0), dynamic_map().clone(), torch.zeros(1), 256),
        exact=True,
    )


def _nf4_dequantize() -> Iterator[Case]:
    kinds = [k for k in BASES if k != "dense"]
    shapes = ((7, 31), (33, 96), (64, 128), (1, 1), (0, 8), (130, 257))
    for dtype, kind, (n, k) in itertools.product(DTYPES, kinds, shapes):
        yield Case(
            "nf4_dequantize",
            f"{dtype_name(dtype)}-{kind}-{size_name(n, k)}",
            lambda r, a=(kind, n, k, dtype): (*r.base(*a), a[3]),
            exact=True,
            core=(n, k) == (7, 31) and dtype == torch.bfloat16,
        )
    for block_size in (32, 128, 256, 512, 1024, 2048, 4096):
        yield Case(
            "nf4_dequantize",
            f"block{block_size}",
            lambda r, b=block_size: (*_quantised(r.normal(37, 3 * b // 8), b), torch.bfloat16),
            exact=True,
        )


def _quantised(w: Tensor, block_size: int) -> tuple[list[Tensor], list[int]]:
    with use_backend("reference"):
        q = NF4Weight.quantize(w, block_size)
    return q.base, q.meta


def _nf4_linear_fwd() -> Iterator[Case]:
    kinds = [k for k in BASES if k != "dense"]
    for dtype, (m, n, k, _), kind in itertools.product(DTYPES, (*SHAPES, SMALL), kinds):
        for bias in (False, True):

            def make(r: Source, a=(m, n, k, dtype, kind, bias)) -> tuple[Any, ...]:
                m, n, k, dtype, kind, bias = a
                x = r.normal(m, k, dtype=dtype)
                return x, *r.base(kind, n, k, dtype), r.normal(n, dtype=dtype) if bias else None

            yield Case(
                "nf4_linear_fwd",
                f"{dtype_name(dtype)}-{size_name(m, n, k)}-{kind}{'-bias' * bias}",
                make,
                core=(m, n, k) == SMALL[:3] and dtype != torch.float16 and bias,
            )
    for kind in ("transposed", "padded-rows", "every-other-column"):
        yield Case(
            "nf4_linear_fwd",
            f"x-{kind}",
            lambda r, s=kind: (
                strided(r.normal(9, 40), s),
                *r.base("nf4", 11, 40, torch.float32),
                None,
            ),
            core=True,
        )


def _nf4_linear_bwd() -> Iterator[Case]:
    kinds = [k for k in BASES if k != "dense"]
    for dtype, (m, n, k, _), kind in itertools.product(DTYPES, (*SHAPES, SMALL), kinds):
        yield Case(
            "nf4_linear_bwd",
            f"{dtype_name(dtype)}-{size_name(m, n, k)}-{kind}",
            lambda r, a=(m, n, k, dtype, kind): (
                r.normal(a[0], a[1], dtype=a[3]),
                *r.base(a[4], a[1], a[2], a[3]),
            ),
            core=(m, n, k) == SMALL[:3] and dtype != torch.float16,
        )
    for kind in ("transposed", "padded-rows", "expanded"):
        yield Case(
            "nf4_linear_bwd",
            f"dy-{kind}",
            lambda r, s=kind: (strided(r.normal(9, 11), s), *r.base("nf4", 11, 40, torch.float32)),
            core=True,
        )


# --- LoRA -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a LoRA call may have besides x, W, A and B."""

    bias: bool = False
    dropout_p: float = 0.0
    rank_diag: bool = False
    out_diag: bool = False
    adapter_dtype: torch.dtype | None = None
    strides: str = ""
    needs: tuple[bool, ...] | None = None
    stream: int = 0
    range: Range = ANY


OPTIONS = {
    "plain": Options(),
    "bias": Options(bias=True),
    "dropout": Options(dropout_p=0.1),
    "rank-diag": Options(rank_diag=True),
    "out-diag": Options(out_diag=True),
    "fp32-adapters": Options(bias=True, adapter_dtype=torch.float32),
    "all": Options(True, 0.5, True, True, torch.float32),
}
STRIDED = {s: Options(True, 0.25, strides=s) for s in ("transposed", "padded-rows")}
WIDE = {
    f"{name}-{kind}": replace(o, range=of)
    for name, of in RANGES.items()
    for kind, o in OPTIONS.items()
    if kind in ("plain", "dropout", "fp32-adapters", "all")
}
STREAMS = {f"stream{s}": Options(dropout_p=0.5, stream=s) for s in (3, 2**32 - 1)}


def _lora(case: tuple[int, int, int, int], dtype: torch.dtype, base: str, o: Options, r: Source):
    """x, base, meta, a, b, scale, bias, dropout_p, seed, rank_diag, out_diag, stream"""
    m, n, k, rank = case
    x = r.normal(m, k, dtype=dtype, std=o.range.x)
    x = strided(x, o.strides) if o.strides and o.strides != "expanded" else x
    adapters = o.adapter_dtype or dtype
    return (
        x,
        *r.base(base, n, k, dtype),
        r.normal(rank, k, dtype=adapters, std=o.range.a * max(k, 1) ** -0.5),
        r.normal(n, rank, dtype=adapters, std=o.range.b * rank**-0.5),
        0.75,
        r.normal(n, dtype=dtype) if o.bias else None,
        o.dropout_p,
        torch.tensor([-1234567890123456789]) if o.dropout_p else None,
        r.normal(rank, dtype=adapters) if o.rank_diag else None,
        r.normal(n, dtype=adapters) if o.out_diag else None,
        o.stream,
    )


def _lora_calls() -> Iterator[tuple[str, tuple, bool, Options]]:
    """label, the arguments of `_lora` before the source, core, options"""
    for dtype, shape, (name, o) in itertools.product(DTYPES, SHAPES, OPTIONS.items()):
        label = f"{dtype_name(dtype)}-{size_name(*shape)}-{name}"
        yield label, (shape, dtype, "dense", o), False, o
    small = OPTIONS | STRIDED | STREAMS
    for dtype, base, (name, o) in itertools.product(DTYPES, BASES, small.items()):
        core = dtype == torch.float32 or name == "all"
        label = f"{dtype_name(dtype)}-{size_name(*SMALL)}-{base}-{name}"
        yield label, (SMALL, dtype, base, o), core and base in ("dense", "nf4-nested"), o
    for shape, base, (name, o) in itertools.product(WIDE_SHAPES, WIDE_BASES, WIDE.items()):
        label = f"float16-{size_name(*shape)}-{base}-{name}"
        yield label, (shape, torch.float16, base, o), False, o
    for shape in SHAPES:
        o = OPTIONS["all"]
        yield (
            f"bfloat16-{size_name(*shape)}-nf4-nested-all",
            (shape, torch.bfloat16, "nf4-nested", o),
            False,
            o,
        )


def _lora_linear_fwd() -> Iterator[Case]:
    for label, call, core, _ in _lora_calls():
        yield Case("lora_linear_fwd", label, lambda r, c=call: _lora(*c, r), core=core)


def _lora_linear_bwd() -> Iterator[Case]:
    def make(call: tuple, o: Options, r: Source) -> tuple[Any, ...]:
        x, base, meta, a, b, scale, bias, *rest, stream = _lora(*call, r)
        dy = r.normal(x.shape[0], meta[0], dtype=x.dtype, std=o.range.dy)
        dy = strided(dy, o.strides) if o.strides and dy.numel() else dy
        s = rank_value(r.normal(x.shape[0], a.shape[0], std=o.range.s), x.dtype)
        diagonals = [t is not None for t in rest[2:]]
        needs = o.needs or (True, True, True, bias is not None, *diagonals, len(base) == 1)
        return dy, x, s, base, meta, a, b, scale, *rest, list(needs), stream

    for label, call, core, o in _lora_calls():
        yield Case("lora_linear_bwd", label, lambda r, c=call, o=o: make(c, o, r), core=core)
    for i in range(7):  # one gradient at a time
        o = Options(True, 0.1, True, True, needs=tuple(j == i for j in range(7)))
        call = (SMALL, torch.float32, "dense", o)
        yield Case(
            "lora_linear_bwd", f"needs-only-{i}", lambda r, c=call, o=o: make(c, o, r), core=True
        )
    o = Options(strides="expanded")
    call = (SMALL, torch.float32, "dense", o)
    yield Case("lora_linear_bwd", "dy-expanded", lambda r, c=call, o=o: make(c, o, r), core=True)


def _dropout_mask() -> Iterator[Case]:
    seeds = (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF)
    # Halves of a step: T is rounded to even.
    ps = (0.0, 0.1, 0.5, 0.999, 0.5 / 65536, 1.5 / 65536, 2.5 / 65536, 1 - 1 / 65536)
    shapes = ((3, 5), (1, 64), (0, 8), (4, 0), (17, 257), (130, 40))
    for seed, stream in itertools.product(seeds, (0, 1, 2**32 - 1)):
        yield Case(
            "dropout_mask",
            f"seed{seed}-stream{stream}",
            lambda r, s=seed, t=stream: (torch.tensor([s]), 9, 29, 0.3, t),
            exact=True,
            core=stream == 1,
        )
    for p, shape in itertools.product(ps, shapes):
        yield Case(
            "dropout_mask",
            f"{size_name(*shape)}-p{p:.6f}",
            lambda r, p=p, s=shape: (torch.tensor([42]), *s, p, 3),
            exact=True,
        )


GENERATORS: dict[str, Callable[[], Iterator[Case]]] = {
    "nf4_quantize": _nf4_quantize,
    "nf4_quantize_scales": _nf4_quantize_scales,
    "nf4_dequantize": _nf4_dequantize,
    "nf4_linear_fwd": _nf4_linear_fwd,
    "nf4_linear_bwd": _nf4_linear_bwd,
    "lora_linear_fwd": _lora_linear_fwd,
    "lora_linear_bwd": _lora_linear_bwd,
    "dropout_mask": _dropout_mask,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "dora_norm": dora_norm,
    "dora_linear_fwd": dora_linear_fwd,
    "dora_linear_bwd": dora_linear_bwd,
    "lora_packed_fwd": lora_packed_fwd,
    "lora_packed_bwd": lora_packed_bwd,
    "glu_fwd": glu_fwd,
    "glu_bwd": glu_bwd,
    "gather_lora_fwd": gather_lora_fwd,
    "gather_lora_add": gather_lora_add,
    "gather_lora_bwd": gather_lora_bwd,
    "gather_lora_embed_fwd": gather_lora_embed_fwd,
    "gather_lora_embed_add": gather_lora_embed_add,
    "gather_lora_embed_bwd": gather_lora_embed_bwd,
}


def cases(op: str) -> list[Case]:
    """Every case of an op; an op without a generator is a failed test, not a gap."""
    return list(GENERATORS[op]()) if op in GENERATORS else []
