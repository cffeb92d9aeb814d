"""`python -m bench resources`: what every Triton kernel takes of a multiprocessor, read from code
that was compiled ahead of time. Nothing runs, nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lora_kernels.ops.common.configs import GEMM_CONFIGS, GemmConfig
from lora_kernels.ops.common.launch import Launch
from lora_kernels.ops.common.strategies import (
    Problem,
    explain_config,
    use_strategy,
)
from lora_kernels.ops.gather.pages import PAGE, pages_of
from lora_kernels.ops.glu.schema import ACTIVATIONS
from lora_kernels.ops.packed.schema import META
from lora_kernels.ops.packed.triton.plan import plan
from tools.gpu_proofs import ways
from tools.gpu_proofs.compile import GPU_TARGETS, Facts, GpuTarget, compile_launch
from tools.gpu_proofs.recorder import lora_backward, lora_forward, record
from tools.gpu_proofs.traffic import tile_of


@dataclass(frozen=True)
class Call:
    """A call of an op to compile; where a tile is given it is forced on the products. Of gated
    units the strategy is the activation, M and N are the sizes; the codec has none, N and K are; of
    many adapters it is the way."""

    op: str
    shape: tuple[int, int, int, int]  # M, N, K, r
    dropout: float
    strategy: str
    tile: GemmConfig | None = None
    quantised: bool = False

    def __str__(self) -> str:
        m, n, k, r = self.shape
        size = f"r={r}" if self.tile else f"M={m} N={n} K={k} r={r}"
        drop = " dropout" if self.dropout else ""
        base = " nf4" if self.quantised else ""
        tile = f" [{self.tile}]" if self.tile else ""
        return f"{self.op} {self.strategy} {size}{drop}{base}{tile}"


def _base(n: int, k: int) -> tuple[list[Tensor], list[int]]:
    """A nested 4-bit W [N, K] of the usual block sizes, as the ops take it."""
    blocks = n * k // 64
    codes, absmax = (torch.empty(size, dtype=torch.uint8) for size in (n * k // 2, blocks))
    return [codes, absmax, *map(torch.empty, (blocks // 256, 256, 1))], [n, k, 64, 0, 256]


def _forward(call: Call) -> list[Any]:
    made = lora_forward(call.shape, dropout=call.dropout)
    if call.quantised:
        made[1:3] = _base(*call.shape[1:3])
    return made


def _backward(call: Call) -> list[Any]:
    forward = _forward(call)
    x, (m, n, _, r) = forward[0], call.shape
    s: Tensor = x.new_empty(m, r)
    return lora_backward(forward, s, x.new_empty(m, n))


def _packed_forward(call: Call) -> list[Any]:
    m, n, k, r = call.shape
    widths = (n, n // 4, n // 4)  # q, k and v with grouped heads
    layers = [_forward(replace(call, shape=(m, width, k, r))) for width in widths]
    x, *_, p, seed, _, _ = layers[0]
    base = [t for layer in layers for t in layer[1]]
    meta = [size for layer in layers for size in (*layer[2], *[0] * (META - len(layer[2])))]
    a, b = [layer[3] for layer in layers], [layer[4] for layer in layers]
    return [x, base, meta, a, b, [1.5] * 3, [None] * 3, p, seed]


def _packed_backward(call: Call) -> list[Any]:
    x, base, meta, a, b, scales, _, p, seed = _packed_forward(call)
    s: Tensor = x.new_empty(x.shape[0], sum(t.shape[0] for t in a))
    dy = [x.new_empty(x.shape[0], t.shape[0]) for t in b]
    needs = [True] * (1 + 2 * 3) + [False] * (2 * 3)
    return [dy, x, s, base, meta, a, b, scales, p, seed, needs]


def _glu(op: str) -> Callable[[Call], list[Any]]:
    def arguments(call: Call) -> list[Any]:
        tensors = [torch.empty(call.shape[:2], dtype=torch.bfloat16) for _ in range(3)]
        activation = ACTIVATIONS.index(call.strategy)
        return [*tensors, activation, True] if op == "glu_bwd" else [*tensors[:2], activation]

    return arguments


def _linear_forward(call: Call) -> list[Any]:
    x, base, meta, *_ = _forward(call)
    return [x, base, meta, None]


def _linear_backward(call: Call) -> list[Any]:
    x, base, meta, *_ = _forward(call)
    return [x.new_empty(x.shape[0], call.shape[1]), base, meta]


def _dequantize(call: Call) -> list[Any]:
    return [*_base(*call.shape[1:3]), torch.bfloat16]


def _quantize(call: Call) -> list[Any]:  # only finite values are taken
    return [torch.zeros(call.shape[1:3], dtype=torch.bfloat16), 64, 0]


def _quantize_scales(call: Call) -> list[Any]:
    return [torch.zeros(call.shape[1] * call.shape[2] // 64), *map(torch.zeros, (256, 1)), 256]


def _gather_forward(call: Call) -> list[Any]:
    """M tokens of 8 slots; a 4-bit base or none, a dense one's product being torch's own."""
    m, n, k, r = call.shape
    slots, columns = 8, pages_of(r)
    a, b = (torch.empty(slots * columns, PAGE, c, dtype=torch.bfloat16) for c in (k, n))
    table = torch.arange(slots * columns, dtype=torch.int32).view(slots, columns)
    ranks = torch.full((slots,), r, dtype=torch.int32)
    dropout = []
    if call.dropout:
        rows = torch.zeros(m, dtype=torch.int32)
        dropout = [torch.zeros(slots, dtype=torch.int64), torch.full_like(ranks, 6554), rows]
    entries = [torch.arange(m, dtype=torch.int32) % slots]
    x = torch.empty(m, k, dtype=torch.bfloat16)
    base, meta = _base(n, k) if call.quantised else ([], [n, k])
    return [x, base, meta, None, [a, b, table, ranks, torch.ones(slots)], entries, dropout]


def _gather_backward(call: Call) -> list[Any]:
    x, base, meta, _, pages, entries, dropout = _gather_forward(call)
    s = x.new_empty(x.shape[0], pages[2].shape[1] * PAGE)
    needs = [True, False, False, True, True, True]
    return [x.new_empty(x.shape[0], meta[0]), x, s, base, meta, pages, entries, dropout, needs]


def _embed_forward(call: Call) -> list[Any]:
    """K is the vocabulary."""
    *_, pages, entries, _ = _gather_forward(replace(call, dropout=0.0))
    pages[0] = pages[0].transpose(1, 2).contiguous()
    ids = torch.zeros(call.shape[0], dtype=torch.int64)
    return [ids, pages[0].new_empty(call.shape[2], call.shape[1]), pages, entries[0]]


def _embed_backward(call: Call) -> list[Any]:
    ids, weight, pages, slots = _embed_forward(call)
    return [weight.new_empty(ids.shape[0], weight.shape[1]), ids, pages, slots, [True] * 3]


# What another op needs to be compiled too: its arguments for a call.
ARGUMENTS: dict[str, Callable[[Call], list[Any]]] = {
    "lora_linear_fwd": _forward,
    "lora_linear_bwd": _backward,
    "lora_packed_fwd": _packed_forward,
    "lora_packed_bwd": _packed_backward,
    "nf4_linear_fwd": _linear_forward,
    "nf4_linear_bwd": _linear_backward,
    "nf4_dequantize": _dequantize,
    "nf4_quantize": _quantize,
    "nf4_quantize_scales": _quantize_scales,
    "glu_fwd": _glu("glu_fwd"),
    "glu_bwd": _glu("glu_bwd"),
    "gather_lora_fwd": _gather_forward,
    "gather_lora_bwd": _gather_backward,
    "gather_lora_embed_fwd": _embed_forward,
    "gather_lora_embed_bwd": _embed_backward,
}
# The kernels with a large product in them.
PRODUCTS = re.compile("gemm|packed_(forward|grad_x)")
# Where tiles are forced, sizes decide nothing but which arguments are multiples of 16.
_ANY = (256, 512, 512)
# op, strategy, dropout, rank: the ways to fill a tile, the one with the most registers of each.
_WAYS = (
    ("lora_linear_fwd", "single_pass", 0.1, 16),
    ("lora_linear_bwd", "single_pass", 0.1, 16),
    ("lora_linear_fwd", "single_pass", 0.0, 64),
    ("lora_linear_fwd", "epilogue", 0.0, 16),
    ("lora_linear_bwd", "epilogue", 0.1, 16),
    ("lora_packed_fwd", "single_pass", 0.1, 16),
    ("lora_packed_bwd", "single_pass", 0.1, 16),
    ("lora_packed_fwd", "epilogue", 0.0, 16),
    ("lora_packed_bwd", "epilogue", 0.1, 16),
)
# Over 4-bit weights, of which the kernels without a branch are too.
_QUANTISED_WAYS = (
    *(way for way in _WAYS if way[3] == 16),
    ("nf4_linear_fwd", "epilogue", 0.0, 0),
    ("nf4_linear_bwd", "epilogue", 0.0, 0),
)
# Of the tiles above one of each kind: descriptors or not, 128, 64 and 16 rows.
_QUANTISED_TILES = tuple(
    c
    for c in GEMM_CONFIGS
    if (c.block_m, c.block_n, c.block_k) in ((128, 128, 64), (64, 64, 64), (16, 64, 128))
)
_THIN_SIZES = ((8192, 4096), (1024, 1024), (16, 4096))
_THIN_RANKS = (16, 64, 256)


def calls(target: GpuTarget) -> Iterator[Call]:
    """Every tile that the device may be given, filled each way; then what the cost model takes
    for real sizes, with the rank-wide kernels beside it."""
    for config in GEMM_CONFIGS:
        for op, strategy, dropout, r in _WAYS:
            if _fits(op, strategy, dropout, r, config, target):
                yield Call(op, (*_ANY, r), dropout, strategy, config)
    for config, (op, strategy, dropout, r) in product(_QUANTISED_TILES, _QUANTISED_WAYS):
        if _fits(op, strategy, dropout, r, config, target, True):
            yield Call(op, (*_ANY, r), dropout, strategy, config, True)
    for op in ("nf4_dequantize", "nf4_quantize", "nf4_quantize_scales"):
        yield Call(op, (0, 4096, 4096, 0), 0.0, "", quantised=True)
    for (m, width), r in product(_THIN_SIZES, _THIN_RANKS):
        for op in ("lora_linear_fwd", "lora_linear_bwd"):
            yield Call(op, (m, width, width, r), 0.1, "epilogue")
            if r == 16:
                yield Call(op, (m, width, width, r), 0.0, "single_pass")
                yield Call(op, (m, width, width, r), 0.0, "addmm")
    for (m, width), op in product(_THIN_SIZES, ("lora_packed_fwd", "lora_packed_bwd")):
        yield Call(op, (m, width, width, 16), 0.0, "single_pass")
        yield Call(op, (m, width, width, 64), 0.1, "epilogue")
    for op, activation in product(("glu_fwd", "glu_bwd"), ACTIVATIONS):
        yield Call(op, (8192, 14336, 0, 0), 0.0, activation)
    for (m, way), r in product(((64, "entries"), (4096, "chunks")), (16, 64)):
        yield Call("gather_lora_fwd", (m, 4096, 4096, r), 0.0, way)
        yield Call("gather_lora_bwd", (m, 4096, 4096, r), 0.1, way)
    for op in ("gather_lora_embed_fwd", "gather_lora_embed_bwd"):
        yield Call(op, (64, 4096, 8192, 16), 0.0, "entries")
    for m in (16, 64, 256):
        yield Call("gather_lora_fwd", (m, 4096, 4096, 64), 0.1, "fused", quantised=True)


def _fits(
    op: str,
    strategy: str,
    dropout: float,
    r: int,
    config: GemmConfig,
    target: GpuTarget,
    quantised: bool = False,
) -> bool:
    """Whether the cost model would ever give this tile to a call."""
    device = replace(target.device, tiles=(config,))
    problem = Problem(*_ANY, r, torch.bfloat16, dropout > 0, quantised=quantised)
    layer = op.replace("packed", "linear").replace("nf4", "lora")
    estimates = explain_config(layer, problem, device).estimates
    fits = any(e.strategy == strategy and e.refusal is None for e in estimates)
    if fits and "packed" in op:
        with use_strategy(strategy):
            found = plan(layer, problem, device)
        fits = (found.strategy, found.config) == (strategy, config)
    return fits


def launches(call: Call, target: GpuTarget) -> list[Launch]:
    """The launches that a call makes."""
    device = target.device
    if call.tile is not None:
        device = replace(device, tiles=(call.tile,))
    function = getattr(torch.ops.lora_kernels, call.op).default
    args = ARGUMENTS[call.op](call)
    way = call.strategy if call.strategy in ways.NAMES else None
    made = record(device, lambda: function(*args), way)
    # The other launches do not depend on the tile; the calls of real sizes have them.
    return [x for x in made if call.tile is None or PRODUCTS.search(x.kernel.fn.__name__)]


def rows(target: GpuTarget, only: str | None = None) -> list[dict[str, Any]]:
    """A line a launch, each different kernel once."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for call in calls(target):
        if only and not re.search(only, str(call)):
            continue
        for launch in launches(call, target):
            tile = tile_of(launch.args, launch.warps, launch.stages)
            flags = " ".join(
                name.lower()
                for name in ("BACKWARD", "DROPOUT", "SINGLE_PASS", "EVEN_K")
                if launch.args.get(name) is True
            )
            strategy = launch.args.get("STRATEGY")
            flags = " ".join(filter(None, (strategy, flags)))
            name = launch.kernel.fn.__name__
            if (name, tile, flags) not in found:
                facts = compile_launch(launch, target).facts
                key = {"target": target.name, "kernel": name, "tile": tile, "flags": flags}
                found[name, tile, flags] = {**key, **_figures(facts), "call": str(call)}
    return list(found.values())


def _figures(facts: Facts) -> dict[str, Any]:
    return {
        "registers": facts.registers,
        "shared": facts.shared,
        "stack": facts.stack,
        "spills": facts.spills,
        "blocks": facts.blocks,
        "occupancy": f"{facts.occupancy:.3f}",
        "tensor": " ".join(f"{n}:{c}" for n, c in facts.tensor.items()),
        "wide_loads": facts.wide_loads,
        "narrow_loads": sum(facts.loads.values()) - facts.wide_loads,
    }


def table(target: GpuTarget, lines: list[dict[str, Any]]) -> Table:
    """The lines of one target."""
    result = Table(title=f"{target.name} ({target.device.name})", title_justify="left")
    columns = [c for c in (lines[0] if lines else {}) if c not in ("target", "call")]
    for column in columns:
        text = column in ("kernel", "tile", "flags", "tensor")
        result.add_column(column, justify="left" if text else "right", no_wrap=True)
    for line in lines:
        bad = line["stack"] or line["spills"] or line["shared"] > target.device.shared_bytes
        result.add_row(*(str(line[c]) for c in columns), style="bold red" if bad else "")
    return result


def targets_of(names: list[str] | None) -> list[GpuTarget]:
    """The targets of these names, or all.

    Raises:
        ValueError: a name is none of them.
    """
    for name in names or []:
        if name not in GPU_TARGETS:
            raise ValueError(f"target: got {name!r}, expected one of {', '.join(GPU_TARGETS)}")
    return [GPU_TARGETS[n] for n in names or GPU_TARGETS]
