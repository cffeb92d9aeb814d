"""Pictures of a result file: speed-up bars, a roofline, and curves over M and r, as PNG."""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.machine import summary
from bench.report import seconds
from bench.runner import BASELINE

# One colour for each provider in every picture (Okabe and Ito's, safe for colour-blind readers).
COLOURS = {
    "ours:native": "#D55E00",
    "ours:triton": "#CC79A7",
    "ours:reference": "#E69F00",
    "ours": "#D55E00",
    "dense": "#555555",
    "torch": "#56B4E9",
    "addmm": "#0072B2",
    "compile": "#004466",
    "peft": "#009E73",
    "peft+bnb": "#00573F",
    "bnb-eval": "#F0E442",
    "bnb-train": "#B8A900",
    "bnb-dequantize": "#B8A900",
    "bnb-quantize": "#B8A900",
    "torchao": "#999999",
}
Rows = list[dict[str, Any]]


def plot(doc: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw what the results allow; returns the files written."""
    timed = [row for row in doc["rows"] if row["p50"] is not None]
    title = summary(doc["machine"])
    figures = {
        "speedup": speedup(timed, title),
        "roofline": roofline(timed, doc["limits"], title),
        "scaling-m": scaling(timed, "m", title),
        "scaling-r": scaling(timed, "r", title),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        path = folder / f"{stem}-{name}.png"
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, dpi=130, format="png")
        os.replace(temporary, path)
        plt.close(figure)
        written.append(path)
    return written


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[k] for k in keys)].append(row)
    return dict(groups)


def speedup(rows: Rows, title: str) -> Figure | None:
    """Time of the case's base (the frozen dense linear; for codecs the slowest) over each one's."""
    cases = {c: r for (c,), r in _groups(rows, "case").items() if len(r) > 1}
    if not cases:
        return None
    count = sum(len(r) for r in cases.values()) + len(cases)
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.19 * count), layout="constrained")
    position, ticks, labels = 0.0, [], []
    for name, members in cases.items():
        base = next((r for r in members if r["provider"] == BASELINE), None)
        base = base or max(members, key=lambda r: r["p50"])
        start = position
        for row in members:
            value = _speedup(row, base)
            axes.barh(position, value, color=_colour(row), height=0.9)
            label = f"{row['provider']}  {value:.2f}×  ({seconds(row['p50'])})"
            axes.annotate(
                label,
                (value, position),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            position += 1
        ticks.append((start + position - 1) / 2)
        labels.append(f"{name}\n(1 = {base['provider']})")
        position += 1
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(position - 0.5, -1)
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.35)  # room for the labels
    axes.set_xlabel("speed-up (log), longer is faster")
    axes.set_title(title, fontsize=9)
    return figure


def _speedup(row: dict[str, Any], base: dict[str, Any]) -> float:
    a, b = row.get("samples") or [], base.get("samples") or []
    if len(a) == len(b) and a:
        return statistics.median(y / x for x, y in zip(a, b, strict=True))
    return base["p50"] / row["p50"]


def roofline(rows: Rows, limits: dict[str, Any] | None, title: str) -> Figure | None:
    """Each result's floors over its time, under the limits measured in the same run."""
    points = [r for r in rows if r["flops_per_s"] and r["op"] not in ("nf4_quantize", "step")]
    if not points or not limits:
        return None
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    x = [r["flops_per_s"] / r["bytes_per_s"] for r in points]
    low, high = min(x) / 2, max(x) * 2
    for dtype in sorted({r["dtype"] for r in points}):
        peak = limits["gemm"][dtype]
        ridge = peak / limits["read"]
        knots = [low, min(max(ridge, low), high), high]
        axes.plot(
            knots,
            [min(peak, k * limits["read"]) / 1e12 for k in knots],
            color="black",
            linewidth=1.2,
        )
        axes.annotate(
            f"{dtype} GEMM {peak / 1e12:.2f} TFLOP/s, read {limits['read'] / 1e9:.1f} GB/s",
            (min(ridge, high), peak / 1e12),
            fontsize=8,
            ha="center",
            va="bottom",
        )
    markers = dict(zip(sorted({r["op"] for r in points}), "osD^v<>Pph*", strict=False))
    for (_, op), members in _groups(points, "provider", "op").items():
        axes.scatter(
            [r["flops_per_s"] / r["bytes_per_s"] for r in members],
            [r["flops_per_s"] / 1e12 for r in members],
            s=28,
            marker=markers[op],
            color=_colour(members[0]),
            edgecolors="black",
            linewidths=0.4,
        )
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s (floor of the case / time)")
    axes.set_xlabel("FLOP per byte (floors of the case)")
    providers = {r["provider"]: _colour(r) for r in points}
    handles = [_key("o", colour, name) for name, colour in providers.items()]
    handles += [_key(marker, "white", op) for op, marker in markers.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    axes.set_title(title, fontsize=9)
    return figure


def _key(marker: str, colour: str, label: str) -> Line2D:
    return Line2D(
        [], [], linestyle="", marker=marker, color=colour, markeredgecolor="black", label=label
    )


def scaling(rows: Rows, over: str, title: str) -> Figure | None:
    """Time over M (or r), one panel for each kind of case that has three values of it or more."""
    same = ["op", "direction", "layer", "dropout", "dtype", "adapter_dtype", "block_size"]
    same += ["nested", "quant_type", "r" if over == "m" else "m"]
    rows = [r for r in rows if r["op"] in ("nf4_linear", "lora_linear", "nf4_lora_linear")]
    panels = {
        key: members
        for key, members in _groups(rows, *same).items()
        if len({r[over] for r in members}) >= 3
    }
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.5 * columns, 4.5 * lines), squeeze=False, layout="constrained"
    )
    for axes, (key, members) in zip(grid.flat, panels.items(), strict=False):
        _curves(axes, members, over)
        op, direction, layer, dropout, *_, other = key
        with_ = f"{'r' if over == 'm' else 'M'}={other}" if other else ""
        axes.set_title(
            " ".join(filter(None, (op, direction, layer, with_, f"p={dropout:g}" * bool(dropout)))),
            fontsize=9,
        )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure


def _curves(axes: Axes, rows: Rows, over: str) -> None:
    for (_,), members in _groups(rows, "provider").items():
        members = sorted(members, key=lambda r: r[over])
        x = [r[over] for r in members]
        axes.plot(
            x,
            [1e3 * r["p50"] for r in members],
            marker="o",
            markersize=3,
            color=_colour(members[0]),
            label=members[0]["provider"],
        )
        axes.fill_between(
            x,
            [1e3 * r["p20"] for r in members],
            [1e3 * r["p80"] for r in members],
            color=_colour(members[0]),
            alpha=0.15,
            linewidth=0,
        )
    floors = sorted({(r[over], r["floor"]) for r in rows if r["floor"]})
    if floors:
        axes.plot(
            [f[0] for f in floors],
            [1e3 * f[1] for f in floors],
            color="black",
            linestyle="--",
            linewidth=1,
            label="floor",
        )
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="M (rows)" if over == "m" else "r (rank)", ylabel="ms")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    axes.legend(fontsize=7)


def _colour(row: dict[str, Any]) -> str:
    return COLOURS.get(row["provider"], "#999999")
