"""Tables of a model's layers: size, format, and the backend that runs each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.fuse import fused_with
from lora_kernels.adapters.layer_kinds import kind_of
from lora_kernels.adapters.layers import (
    adapter_layers,
    count_bytes,
    count_parameters,
    named_modules,
    unwrap,
)
from lora_kernels.adapters.plan import Plan
from lora_kernels.adapters.words import by_reason
from lora_kernels.dispatch import chosen
from lora_kernels.ops.common.checks import FLOATS, names
from lora_kernels.ops.dora.magnitude import norm_dtype


@dataclass(frozen=True)
class LayerRow:
    """One layer of this package, or several alike.

    Attributes:
        name: the layer's full name, or the last part of it for several alike.
        shape: (N, K) of the weight.
        base: how the base weight is stored, such as "bfloat16" or "nf4/64 nested".
        r, alpha: of the adapter; None without one.
        use_dora: whether the adapter is DoRA.
        run_as_one: the layers of the group that `fuse_projections` runs as one, "" if none.
        path: the backend of the forward; "-" for plain PyTorch, "" if it was not asked for.
        count: how many layers the row stands for.
    """

    name: str
    shape: tuple[int, int]
    base: str
    r: int | None = None
    alpha: float | None = None
    path: str = ""
    count: int = 1
    use_dora: bool = False
    run_as_one: str = ""


def layer_row(name: str, layer: Any, path: str = "", run_as_one: str = "") -> LayerRow:
    kind = kind_of(layer)
    return LayerRow(
        name,
        (layer.out_features, layer.in_features),
        kind.base_format(layer),
        layer.r if kind.adapted else None,
        layer.alpha if kind.adapted else None,
        path,
        use_dora=kind.adapted and layer.use_dora,
        run_as_one=run_as_one,
    )


def group_rows(rows: Iterable[LayerRow]) -> list[LayerRow]:
    """Put layers into one row if they have the same last name and are alike in everything else."""
    groups: dict[LayerRow, int] = {}
    for row in rows:
        key = replace(row, name=row.name.rsplit(".", 1)[-1], count=1)
        groups[key] = groups.get(key, 0) + row.count
    return [replace(row, count=count) for row, count in groups.items()]


def table(rows: Sequence[LayerRow]) -> str:
    """The rows as text, without columns that hold no information."""
    header = ["layer", "count", "N x K", "base", "adapter", "r", "alpha", "path", "run as one"]
    cells = [header] + [
        [
            row.name,
            str(row.count),
            f"{row.shape[0]} x {row.shape[1]}",
            row.base,
            "-" if row.r is None else "DoRA" if row.use_dora else "LoRA",
            "-" if row.r is None else str(row.r),
            "-" if row.alpha is None else f"{row.alpha:g}",
            row.path,
            row.run_as_one or "-",
        ]
        for row in rows
    ]
    dropped = set() if any(row.path for row in rows) else {"path"}
    if all(row.count == 1 for row in rows):
        dropped.add("count")
    if not any(row.use_dora for row in rows):
        dropped.add("adapter")
    if not any(row.run_as_one for row in rows):
        dropped.add("run as one")
    columns = [c for c in zip(*cells, strict=True) if c[0] not in dropped]
    right = {"count", "r", "alpha"}
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for i in range(len(cells)):
        parts = [
            column[i].rjust(width) if column[0] in right else column[i].ljust(width)
            for column, width in zip(columns, widths, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def with_unit(n: int) -> str:
    """A number of bytes with a decimal unit."""
    size = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


@dataclass(frozen=True)
class LoRAReport:
    """What `apply_lora` did; `print` shows it as a table.

    Attributes:
        modules: names of the layers that have an adapter now.
        quantized: names of the layers whose weight was quantised, with an adapter or without.
        skipped: (name, reason) of linear layers without an adapter, or left dense.
        trainable_parameters, total_parameters: a 4-bit weight counts its elements.
        bytes_before, bytes_after: memory of all parameters and buffers.
        layers: one row per adapted layer.
        modules_to_save: names of the modules that train whole and are saved with the adapters.
        trainable_tokens: the tokens whose rows train, by the names of their modules.

    Examples:
        >>> report = lk.apply_lora(model, r=8, target_modules=["q_proj", "v_proj"])
        >>> report.modules
        ('model.layers.0.self_attn.q_proj', 'model.layers.0.self_attn.v_proj')
        >>> report.trainable_parameters
        1792
    """

    modules: tuple[str, ...]
    quantized: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    trainable_parameters: int
    total_parameters: int
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerRow, ...]
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        lines = []
        if self.modules:
            lines = [
                f"adapters on {len(self.modules)} layers: {self.trainable_parameters:,} of "
                f"{self.total_parameters:,} parameters train ({share:.3g} %)",
                table(group_rows(self.layers)),
            ]
        if self.modules_to_save:
            lines.append(f"train whole, saved with them: {', '.join(self.modules_to_save)}")
        for name, tokens in self.trainable_tokens.items():
            lines.append(f"tokens that train: {len(tokens)} rows of {name}")
        lines += [
            f"memory of the weights: {with_unit(self.bytes_before)} -> "
            f"{with_unit(self.bytes_after)}, {len(self.quantized)} layers quantised",
        ]
        return "\n".join([*lines, *by_reason("left alone", self.skipped)])


@dataclass(frozen=True)
class ModelReport:
    """Every layer of this package in a model; `print` shows it as a table.

    Attributes:
        layers: one row each, in the model's order.
        trainable_parameters, total_parameters: a 4-bit weight counts its elements.
        bytes: memory of all parameters and buffers.
        rows, dtype: the rows (M) and the dtype of x for which the path was asked.

    Examples:
        >>> _ = lk.apply_lora(model, target_modules=["q_proj"], dropout=0.0)
        >>> report = lk.model_report(model, rows=8)
        >>> [row.name for row in report.layers], report.rows
        (['model.layers.0.self_attn.q_proj'], 8)
    """

    layers: tuple[LayerRow, ...]
    trainable_parameters: int
    total_parameters: int
    bytes: int
    rows: int
    dtype: torch.dtype

    def __str__(self) -> str:
        if not self.layers:
            return "no layer of lora_kernels in this model"
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        return "\n".join(
            [
                table(group_rows(self.layers)),
                f"path for M={self.rows} rows of {names([self.dtype])}; "
                f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
                f"({share:.3g} %), {with_unit(self.bytes)}",
            ]
        )


def make_report(model: nn.Module, plan: Plan, bytes_before: int) -> LoRAReport:
    """The report on a plan that was carried out."""
    trainable, total = count_parameters(model)
    return LoRAReport(
        modules=plan.targets.names,
        quantized=tuple(name for name in plan.replaced if name in plan.quantized),
        skipped=plan.targets.skipped + plan.kept_dense,
        trainable_parameters=trainable,
        total_parameters=total,
        bytes_before=bytes_before,
        bytes_after=count_bytes(model),
        layers=tuple(layer_row(name, module) for name, module in adapter_layers(model)),
        modules_to_save=plan.trained,
        trainable_tokens={row.name: row.tokens for row in plan.rows},
    )


def model_report(
    model: nn.Module, *, rows: int = 512, dtype: torch.dtype | None = None
) -> ModelReport:
    """List every layer of this package and the backend that its forward takes.

    Args:
        model: any model.
        rows: the number of rows of x (batch times sequence) that the path is for.
        dtype: x's dtype; the base weight's by default.

    Raises:
        ValueError: `rows` is negative.
        TypeError: `dtype` is not a floating dtype.

    Examples:
        >>> _ = lk.apply_lora(model, quantize="nf4")
        >>> report = lk.model_report(model, rows=512)
        >>> len(report.layers)  # print(report) shows each one's backend
        7
    """
    if rows < 0:
        raise ValueError(f"rows: got {rows}, expected 0 or more")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: got {names([dtype])}, expected {names(FLOATS)}")
    model = unwrap(model)
    found = [(name, m) for name, m in named_modules(model) if kind_of(m).reported]
    fused = fused_with(model)
    layers = tuple(
        layer_row(name, m, forward_path(m, rows, dtype), fused.get(name, "")) for name, m in found
    )
    trainable, total = count_parameters(model)
    first: Any = found[0][1] if found else None
    used = dtype or (torch.get_default_dtype() if first is None else first.weight.dtype)
    return ModelReport(layers, trainable, total, count_bytes(model), rows, used)


def forward_path(layer: Any, rows: int, dtype: torch.dtype | None) -> str:
    """The backend of the layer's forward for x [rows, K], as the layer stands now."""
    kind = kind_of(layer)
    dtype = dtype or layer.weight.dtype
    device = layer.weight.device
    if device.type == "meta":
        return "meta device"
    x = torch.empty(rows, layer.in_features, device=device, dtype=dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    base, meta = kind.base_operand(layer)
    if not (kind.adapted and layer.adapter_enabled and not layer.merged):
        if not kind.four_bit or (kind.adapted and layer.merged_dense):
            return "-"
        return chosen("nf4_linear_fwd", x, base, meta, bias) or "none"
    p = layer.dropout if layer.training else 0.0
    seed = torch.zeros(1, dtype=torch.int64, device=device) if p else None
    a, b = layer.lora_A, layer.lora_B
    magnitude = layer.lora_magnitude_vector
    if magnitude is not None:
        factors = (magnitude, torch.empty_like(magnitude, dtype=norm_dtype(base)))
        of_dora = (x, base, meta, a, b, layer.scale, *factors, bias, p, seed, False)
        return chosen("dora_linear_fwd", *of_dora) or "none"
    args = (x, base, meta, a, b, layer.scale, bias, p, seed, None, None)
    return chosen("lora_linear_fwd", *args) or "none"
