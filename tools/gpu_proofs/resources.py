"""`python -m bench resources`: what every Triton kernel takes of a multiprocessor, read from code
that was compiled ahead of time. Nothing runs, nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from rich.table import Table

from lora_kernels.ops.common.configs import GEMM_CONFIGS, GemmConfig
from lora_kernels.ops.common.launch import Launch
from lora_kernels.ops.common.strategies import (
    Problem,
    explain_config,
    use_strategy,
)
from lora_kernels.ops.glu.schema import ACTIVATIONS
from lora_kernels.ops.packed.triton.plan import plan
from tools.gpu_proofs import ways
from tools.gpu_proofs.compile import GPU_TARGETS, Facts, GpuTarget, compile_launch
from tools.gpu_proofs.recorder import record, unfilled
from tools.gpu_proofs.traffic import tile_of
from tools.gpu_proofs.workloads import packed_widths
from tools.op_inputs import arguments as op_arguments
from tools.op_inputs.gather import Gather
from tools.op_inputs.glu import Glu
from tools.op_inputs.layer import Codec, Layer
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import Hollow, Source


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


def arguments(call: Call) -> tuple[Any, ...]:
    """What the op is called with: q, k and v with grouped heads where it is packed, tokens of 8
    slots where it has many adapters."""
    (m, n, k, r), base = call.shape, "nf4-nested" if call.quantised else "dense"
    p, family = call.dropout, call.op.split("_")[0]
    made: Any
    if "packed" in call.op:
        made = Packed(m, k, packed_widths(n), (r,) * 3, bases=(base,) * 3, dropout=p)
    elif family == "gather":
        # A dense base's product would be torch's own.
        made = Gather(
            m, k, (n,), (r,) * 8, slots="in-turn", base="", dropout=(p,) if p else (), spare=0
        )
        if call.quantised or "embed" in call.op:
            made = replace(made, base=base)
    elif family == "glu":
        made = Glu((m, n), call.strategy, need_h=True)
    elif call.op.startswith("nf4_") and "linear" not in call.op:
        made = Codec(n, k)
    else:
        made = Layer(call.shape, base=base, dropout=p)
    if call.op == "nf4_quantize_scales":
        return torch.zeros(n * k // 64), *map(torch.zeros, (256, 1)), 256
    # A quantiser takes only finite values.
    source = Source() if call.op == "nf4_quantize" else Hollow()
    return op_arguments(call.op, made, source)


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
    for (m, way), r in product(((64, "per_token"), (4096, "grouped")), (16, 64)):
        yield Call("gather_lora_fwd", (m, 4096, 4096, r), 0.0, way)
        yield Call("gather_lora_bwd", (m, 4096, 4096, r), 0.1, way)
    for op in ("gather_lora_embed_fwd", "gather_lora_embed_bwd"):
        yield Call(op, (64, 4096, 8192, 16), 0.0, "per_token")
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
    way = call.strategy if call.strategy in ways.NAMES else None
    with unfilled():
        args = arguments(call)
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
            tile = tile_of(launch.constants, launch.warps, launch.stages)
            flags = " ".join(
                name.lower()
                for name in ("BACKWARD", "DROPOUT", "SINGLE_PASS", "EVEN_K")
                if launch.constants.get(name) is True
            )
            strategy = launch.constants.get("STRATEGY")
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
