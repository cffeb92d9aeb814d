"""Inputs for every op, by name: the parity and contract tests find them through the registry.

A new op adds one generator to `GENERATORS`. A case holds the op's positional arguments on the CPU;
`Case.build` makes the same values every time, on any device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.nf4.double_quant import dynamic_map
from tests.ops.case import WIDE_BASES, WIDE_SHAPES, Case, case_of, dtype_name, size_name
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
from tools.op_inputs.layer import Layer
from tools.op_inputs.source import BASES, BF16, DTYPES, FP16, FP32, RANGES, Source

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


def _quantised(r: Source, n: int, k: int, block: int) -> tuple[list[Tensor], list[int]]:
    q = r.quantised(r.normal(n, k), (block, True, "nf4"))
    return q.base, q.meta


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
            lambda r, b=block_size: (*_quantised(r, 37, 3 * b // 8, b), BF16),
            exact=True,
        )


def _nf4_linear(op: str, strides: tuple[str, ...], biases: tuple[bool, ...]) -> Iterator[Case]:
    kinds = [k for k in BASES if k != "dense"]
    for dtype, (m, n, k, _), kind in itertools.product(DTYPES, (*SHAPES, SMALL), kinds):
        for bias in biases:
            yield case_of(
                op,
                f"{dtype_name(dtype)}-{size_name(m, n, k)}-{kind}{'-bias' * bias}",
                Layer((m, n, k, 0), dtype, base=kind, bias=bias),
                core=(m, n, k) == SMALL[:3] and dtype is not FP16 and bias == biases[-1],
            )
    for kind in strides:
        label = f"{'dy' if op.endswith('_bwd') else 'x'}-{kind}"
        call = Layer((9, 11, 40, 0), FP32, base="nf4", strides=kind)
        yield case_of(op, label, call, core=True)


def _nf4_linear_fwd() -> Iterator[Case]:
    kinds = ("transposed", "padded-rows", "every-other-column")
    return _nf4_linear("nf4_linear_fwd", kinds, (False, True))


def _nf4_linear_bwd() -> Iterator[Case]:
    return _nf4_linear("nf4_linear_bwd", ("transposed", "padded-rows", "expanded"), (False,))


# --- LoRA -----------------------------------------------------------------------------------------

# What a call may have besides sizes, dtype and base.
Options = dict[str, Any]
DIAGONALS: Options = {"rank_diag": True, "out_diag": True}
ALL: Options = {"bias": True, "dropout": 0.5, **DIAGONALS, "adapter": FP32}
OPTIONS: dict[str, Options] = {
    "plain": {},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.1},
    "rank-diag": {"rank_diag": True},
    "out-diag": {"out_diag": True},
    "fp32-adapters": {"bias": True, "adapter": FP32},
    "all": ALL,
}
STRIDED: dict[str, Options] = {
    s: {"bias": True, "dropout": 0.25, "strides": s} for s in ("transposed", "padded-rows")
}
STREAMS: dict[str, Options] = {f"stream{s}": {"dropout": 0.5, "stream": s} for s in (3, 2**32 - 1)}
WIDE: dict[str, Options] = {
    f"{name}-{kind}": {**OPTIONS[kind], "range": of}
    for name, of in RANGES.items()
    for kind in ("plain", "dropout", "fp32-adapters", "all")
}
TINY = Layer(SMALL, FP32, grad_base=True)


def _lora_calls() -> Iterator[tuple[str, Layer, bool]]:
    """label, call, core"""
    for dtype, shape, (name, o) in itertools.product(DTYPES, SHAPES, OPTIONS.items()):
        label = f"{dtype_name(dtype)}-{size_name(*shape)}-{name}"
        yield label, Layer(shape, dtype, grad_base=True, **o), False
    small = OPTIONS | STRIDED | STREAMS
    for dtype, base, (name, o) in itertools.product(DTYPES, BASES, small.items()):
        core = dtype is FP32 or name == "all"
        label = f"{dtype_name(dtype)}-{size_name(*SMALL)}-{base}-{name}"
        call = Layer(SMALL, dtype, base=base, grad_base=True, **o)
        yield label, call, core and base in ("dense", "nf4-nested")
    for shape in SHAPES:
        label = f"bfloat16-{size_name(*shape)}-nf4-nested-all"
        yield label, Layer(shape, BF16, base="nf4-nested", **ALL), False
    for shape, base, (name, o) in itertools.product(WIDE_SHAPES, WIDE_BASES, WIDE.items()):
        label = f"float16-{size_name(*shape)}-{base}-{name}"
        yield label, Layer(shape, FP16, base=base, grad_base=True, **o), False


def _lora_linear_fwd() -> Iterator[Case]:
    for label, call, core in _lora_calls():
        yield case_of("lora_linear_fwd", label, call, core=core)


def _lora_linear_bwd() -> Iterator[Case]:
    for label, call, core in _lora_calls():
        yield case_of("lora_linear_bwd", label, call, core=core)
    for i in range(7):  # one gradient at a time
        needs = tuple(j == i for j in range(7))
        call = replace(TINY, bias=True, dropout=0.1, **DIAGONALS, needs=needs)
        yield case_of("lora_linear_bwd", f"needs-only-{i}", call, core=True)
    call = replace(TINY, strides="expanded")
    yield case_of("lora_linear_bwd", "dy-expanded", call, core=True)


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
