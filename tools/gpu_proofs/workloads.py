"""The calls whose traffic `bench traffic` counts, by family."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lora_kernels import NF4Weight, use_backend
from lora_kernels.ops.common.strategies import STRATEGIES
from lora_kernels.ops.glu.schema import ACTIVATIONS
from lora_kernels.ops.packed.schema import META
from tools.gpu_proofs.baselines import Sizes
from tools.gpu_proofs.gather_workloads import gather
from tools.gpu_proofs.recorder import lora_backward, lora_forward, normal
from tools.gpu_proofs.workload import BF16, Fill, Shape, Workload, call, in_fp64, nbytes, quantised

SCALE = 1.5
FAMILIES = ("lora", "packed", "dora", "glu", "nf4", "gather")
PLANNED = ("lora", "packed", "dora")  # whose tiles are those of a larger layer


def workloads(
    families: Sequence[str], shape: Shape, dropout: float, fill: Fill = normal
) -> list[Workload]:
    """Every workload of the families; only the LoRA layers' have a dropout other than 0."""
    makers = {"lora": _lora, "packed": _packed, "dora": _dora}
    plain = {"glu": _glu, "nf4": _nf4, "gather": gather}
    found = []
    for family in families:
        if family in makers:
            found += makers[family](shape, dropout, fill)
        elif not dropout:
            found += plain[family](shape, fill)
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


def _made(op: str, args: list[Any], fill: Fill) -> dict[str, Tensor]:
    """What a forward that rounds once gives its backward, in the type of its first argument."""
    hollow, dtype = fill is torch.empty, args[0].dtype
    with (
        FakeTensorMode(allow_non_fake_inputs=True) if hollow else nullcontext(),
        use_backend("reference"),
    ):
        made = call(op, args if hollow else in_fp64(args))
    return {
        n: torch.empty(t.shape, dtype=dtype) if hollow else t.to(dtype) for n, t in made.items()
    }


@dataclass
class _Layer:
    """The tensors of one LoRA layer."""

    forward: list[Any]
    s: Tensor
    dy: Tensor
    x: Tensor = field(init=False)
    w: Tensor = field(init=False)
    adapters: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.x, (self.w, *_) = self.forward[0], self.forward[1]
        self.adapters = self.forward[3], self.forward[4]


def _layer(shape: Shape, dropout: float, fill: Fill) -> _Layer:
    args = lora_forward(shape, dropout=dropout, fill=fill)
    s = _made("lora_linear_fwd", args, fill)["s"]
    return _Layer(args, s, fill(*shape[:2], dtype=BF16))


def _lora(shape: Shape, dropout: float, fill: Fill) -> list[Workload]:
    layer, z = _layer(shape, dropout, fill), Sizes(*shape)
    m, n, k, _ = shape
    return [
        Workload(
            "forward", "lora_linear_fwd", layer.forward, z, dropout,
            z.floor["forward"], z.flops["forward"], m * n, STRATEGIES,
        ),
        Workload(
            "backward", "lora_linear_bwd", lora_backward(layer.forward, layer.s, layer.dy), z,
            dropout, z.floor["backward"], z.flops["backward"], m * k, STRATEGIES,
        ),
    ]  # fmt: skip


def packed_widths(n: int) -> tuple[int, ...]:
    """q, k and v with grouped heads."""
    return n, n // 4, n // 4


def _packed(shape: Shape, dropout: float, fill: Fill) -> list[Workload]:
    m, n, k, r = shape
    widths = packed_widths(n)
    parts = [_layer((m, width, k, r), dropout, fill) for width in widths]
    x, *_, p, seed, _, _ = parts[0].forward
    w, dy = [t.w for t in parts], [t.dy for t in parts]
    meta = [size for width in widths for size in (width, k, *[0] * (META - 2))]
    a, b = ([t.adapters[i] for t in parts] for i in (0, 1))
    args = [x, w, meta, a, b, [SCALE] * 3, [None] * 3, p, seed]
    s = _made("lora_packed_fwd", args, fill)["s"]
    needs = [True] * (1 + 2 * 3) + [False] * (2 * 3)
    back = [dy, x, s, w, meta, a, b, [SCALE] * 3, p, seed, needs]
    z = Sizes(m, sum(widths), k, r)
    forward = nbytes(x, *w, *a, *b, *dy)
    thin = 2 * m * r * sum(width + k for width in widths)
    product = 2 * m * sum(widths) * k
    both = ("single_pass", "epilogue")
    return [
        Workload(
            "packed forward", "lora_packed_fwd", args, z, dropout,
            forward, product + thin, m * sum(widths), both,
        ),
        Workload(
            "packed backward", "lora_packed_bwd", back, z, dropout,
            forward + nbytes(x, *a, *b), product + 2 * thin, m * k, both,
        ),
    ]  # fmt: skip


def _dora(shape: Shape, dropout: float, fill: Fill) -> list[Workload]:
    layer, z = _layer(shape, dropout, fill), Sizes(*shape)
    m, n, k, r = shape
    x, base, meta, a, b, scale, bias, p, seed, *_ = layer.forward
    norm = torch.linalg.vector_norm(layer.w.double() + scale * (b.double() @ a.double()), dim=1)
    norm = norm.float()
    magnitude = (norm * (1 + 0.25 * torch.rand(n))).to(BF16)
    keep = dropout > 0
    forward = [x, base, meta, a, b, scale, magnitude, norm, bias, p, seed, keep]
    made = _made("dora_linear_fwd", forward, fill)
    saved = [None, made["z"]] if keep else [made["y"], None]
    needs = [True, True, True, True, False, False]
    back = [layer.dy, x, made["s"], base, meta, a, b, scale, magnitude, norm, p, seed]
    back += [*saved, needs]
    rows = nbytes(magnitude, norm)
    small = nbytes(layer.w, a, b) + norm.nbytes
    return [
        Workload(
            "dora norm", "dora_norm", [None, base, meta, a, b, scale], z, dropout,
            small, 2 * n * k * (r + 1) + 2 * r * r * (n + k), n,
        ),
        Workload(
            "dora forward", "dora_linear_fwd", forward, z, dropout,
            z.floor["forward"] + rows + keep * layer.dy.nbytes, z.flops["forward"], m * n,
        ),
        Workload(  # one more product for the magnitude's gradient: y or z is read
            "dora backward", "dora_linear_bwd", back, z, dropout,
            z.floor["backward"] + rows + magnitude.nbytes + layer.dy.nbytes,
            z.flops["backward"], m * k,
        ),
    ]  # fmt: skip


def _glu(shape: Shape, fill: Fill) -> list[Workload]:
    m, n = shape[:2]
    dh, g, u = (fill(m, n, dtype=BF16) for _ in range(3))
    z, silu = Sizes(m, n, 0, 0), ACTIVATIONS.index("silu")
    floor = nbytes(g, u, dh)
    return [
        Workload("glu forward", "glu_fwd", [g, u, silu], z, 0.0, floor, 0, m * n),
        Workload(
            "glu backward", "glu_bwd", [dh, g, u, silu, True], z, 0.0, 2 * floor, 0, 3 * m * n
        ),
    ]


def _nf4(shape: Shape, fill: Fill) -> list[Workload]:
    """The codec four times as wide, the layer for 64 tokens and for M, a LoRA layer over it."""
    m, n, k, _ = shape
    found = []
    for kind in ("plain", "nested"):
        q = quantised(n, 4 * k, kind == "nested", fill)
        floor = nbytes(*q.base) + 2 * n * 4 * k
        args = [q.base, q.meta, BF16]
        name, z = f"nf4 dequantise {kind}", Sizes(0, n, 4 * k, 0)
        found.append(Workload(name, "nf4_dequantize", args, z, 0.0, floor, 0, 4 * n * k))
    q = quantised(n, k, True, fill)
    with use_backend("reference"):
        w = q.dequantize(BF16)  # one rounding rule: what it is in bf16, whoever decodes it
    for tokens, ways in ((64, ("epilogue",)), (m, ("epilogue", "addmm"))):
        z = Sizes(tokens, n, k, 0)
        x, dy = fill(tokens, k, dtype=BF16), fill(tokens, n, dtype=BF16)
        floor, flops = nbytes(x, dy, *q.base), 2 * tokens * n * k
        forward, back = [x, q.base, q.meta, None], [dy, q.base, q.meta]
        for name, op, args, size, dense in (
            ("nf4 forward", "nf4_linear_fwd", forward, tokens * n, _dense_forward(x, w)),
            ("nf4 grad x", "nf4_linear_bwd", back, tokens * k, _dense_backward(x, dy, w)),
        ):
            found.append(Workload(name, op, args, z, 0.0, floor, flops, size, ways, dense))
    return found + [_over(q, w, layer) for layer in _lora(shape, 0.0, fill)]


def _over(q: NF4Weight, w: Tensor, layer: Workload) -> Workload:
    """A LoRA layer's call with the 4-bit q, which is w decoded, for a base."""
    at = 1 if layer.name == "forward" else 3
    args, dense = list(layer.args), list(layer.args)
    args[at : at + 2], dense[at] = [q.base, q.meta], [w]
    return replace(
        layer,
        name=f"nf4 lora {layer.name}",
        args=args,
        floor=layer.floor - w.nbytes + nbytes(*q.base),
        dense=(layer.op, dense),
    )


def _dense_forward(x: Tensor, w: Tensor) -> tuple[str, list[Any]]:
    """x·Wᵀ as a LoRA layer whose branch is zero."""
    (n, k), zero = w.shape, torch.zeros
    branch = [zero(1, k, dtype=BF16), zero(n, 1, dtype=BF16), 0.0]
    return "lora_linear_fwd", [x, [w], [n, k], *branch, None, 0.0, None, None, None]


def _dense_backward(x: Tensor, dy: Tensor, w: Tensor) -> tuple[str, list[Any]]:
    """dy·W as the gradient of such a layer."""
    _, (_, base, meta, a, b, scale, *_) = _dense_forward(x, w)
    needs = [True] + [False] * 6
    s = x.new_zeros(x.shape[0], 1)
    return "lora_linear_bwd", [dy, x, s, base, meta, a, b, scale, 0.0, None, None, None, needs]
