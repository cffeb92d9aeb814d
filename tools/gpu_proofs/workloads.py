"""The calls whose traffic `bench traffic` counts, by family."""

from __future__ import annotations

from collections.abc import Sequence

from lora_kernels.ops.common.strategies import STRATEGIES
from tools.gpu_proofs.baselines import Sizes
from tools.gpu_proofs.gather_workloads import gather_workloads
from tools.gpu_proofs.workload import Workload, nbytes
from tools.op_inputs import arguments, dora, layer, packed
from tools.op_inputs.dora import Dora
from tools.op_inputs.glu import Glu
from tools.op_inputs.layer import Codec, Layer
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import BF16, Shape, Source

FAMILIES = ("lora", "packed", "dora", "glu", "nf4", "gather")
SCALE = 1.5  # of every adapter
PLANNED = ("lora", "packed", "dora")  # whose tiles are those of a larger layer


def workloads(
    families: Sequence[str], shape: Shape, dropout: float, source: Source
) -> list[Workload]:
    """Every workload of the families; only the LoRA layers' have a dropout other than 0."""
    makers = {"lora": _lora, "packed": _packed, "dora": _dora}
    plain = {"glu": _glu, "nf4": _nf4, "gather": gather_workloads}
    found = []
    for family in families:
        if family in makers:
            found += makers[family](shape, dropout, source)
        elif not dropout:
            found += plain[family](shape, source)
    return found


def families_of(names: list[str] | None) -> list[str]:
    """The families of these names, or all.

    Raises:
        ValueError: a name is none of them.
    """
    for name in names or []:
        if name not in FAMILIES:
            raise ValueError(f"family: got {name!r}, expected one of {', '.join(FAMILIES)}")
    return list(names or FAMILIES)


def _lora(
    shape: Shape, dropout: float, source: Source, base: str = "dense", prefix: str = ""
) -> list[Workload]:
    c, z, (m, n, k, _) = Layer(shape, base=base, dropout=dropout, scale=SCALE), Sizes(*shape), shape
    found = []
    for name, outputs in (("forward", m * n), ("backward", m * k)):
        op = f"lora_linear_{'bwd' if name == 'backward' else 'fwd'}"
        args = arguments(op, c, source)
        w = args[3 if name == "backward" else 1]
        floor = z.floor[name] - n * k * BF16.itemsize + nbytes(*w)
        sizes = (z, dropout, floor, z.flops[name], outputs)
        found.append(Workload(prefix + name, op, args, *sizes, STRATEGIES))
    return found


def packed_widths(n: int) -> tuple[int, ...]:
    """q, k and v with grouped heads."""
    return n, n // 4, n // 4


def _packed(shape: Shape, dropout: float, source: Source) -> list[Workload]:
    m, n, k, r = shape
    widths = packed_widths(n)
    c = Packed(m, k, widths, (r,) * 3, dropout=dropout, scales=(SCALE,) * 3)
    args, back = packed.forward(c, source), packed.backward(c, source)
    dy, (x, w, _, a, b, *_) = back[0], args
    z = Sizes(m, sum(widths), k, r)
    floor = nbytes(x, *w, *a, *b, *dy)
    branch = 2 * m * r * sum(width + k for width in widths)
    product = 2 * m * sum(widths) * k
    both = ("single_pass", "epilogue")
    return [
        Workload(
            "packed forward", "lora_packed_fwd", args, z, dropout,
            floor, product + branch, m * sum(widths), both,
        ),
        Workload(
            "packed backward", "lora_packed_bwd", back, z, dropout,
            floor + nbytes(x, *a, *b), product + 2 * branch, m * k, both,
        ),
    ]  # fmt: skip


def _dora(shape: Shape, dropout: float, source: Source) -> list[Workload]:
    z, (m, n, k, r) = Sizes(*shape), shape
    c = Dora(shape, dropout=dropout, scale=SCALE)
    args, back = dora.forward(c, source), dora.backward(c, source)
    _, base, meta, a, b, scale, magnitude, norm, *_ = args
    rows, (w,), dy = nbytes(magnitude, norm), base, back[0]
    small = nbytes(w, a, b) + norm.nbytes
    return [
        Workload(
            "dora norm", "dora_norm", [None, base, meta, a, b, scale], z, dropout,
            small, 2 * n * k * (r + 1) + 2 * r * r * (n + k), n,
        ),
        Workload(
            "dora forward", "dora_linear_fwd", args, z, dropout,
            z.floor["forward"] + rows + dy.nbytes, z.flops["forward"], m * n,
        ),
        Workload(  # one more product for the magnitude's gradient: u is read
            "dora backward", "dora_linear_bwd", back, z, dropout,
            z.floor["backward"] + rows + magnitude.nbytes + dy.nbytes,
            z.flops["backward"], m * k,
        ),
    ]  # fmt: skip


def _glu(shape: Shape, source: Source) -> list[Workload]:
    m, n = shape[:2]
    z, floor, c = Sizes(m, n, 0, 0), 3 * m * n * BF16.itemsize, Glu((m, n), need_h=True)
    back = arguments("glu_bwd", c, source)
    return [
        Workload("glu forward", "glu_fwd", back[1:4], z, 0.0, floor, 0, m * n),
        Workload("glu backward", "glu_bwd", back, z, 0.0, 2 * floor, 0, 3 * m * n),
    ]


def _nf4(shape: Shape, source: Source) -> list[Workload]:
    """The codec four times as wide, the layer for 64 tokens and for M, a LoRA layer over it."""
    m, n, k, _ = shape
    found = []
    for kind in ("plain", "nested"):
        args = layer.dequantize(Codec(n, 4 * k, form=(64, kind == "nested", "nf4")), source)
        floor = nbytes(*args[0]) + 2 * n * 4 * k
        name, z = f"nf4 dequantise {kind}", Sizes(0, n, 4 * k, 0)
        found.append(Workload(name, "nf4_dequantize", args, z, 0.0, floor, 0, 4 * n * k))
    for tokens, ways in ((64, ("epilogue",)), (m, ("epilogue", "addmm"))):
        z, c = Sizes(tokens, n, k, 0), Layer((tokens, n, k, 0), base="nf4-nested")
        for name, op, outputs in (
            ("nf4 forward", "nf4_linear_fwd", tokens * n),
            ("nf4 grad x", "nf4_linear_bwd", tokens * k),
        ):
            args = arguments(op, c, source)
            floor = nbytes(*args[1]) + tokens * (n + k) * BF16.itemsize
            flops = 2 * tokens * n * k
            found.append(Workload(name, op, args, z, 0.0, floor, flops, outputs, ways))
    return found + _lora(shape, 0.0, source, "nf4-nested", "nf4 lora ")
