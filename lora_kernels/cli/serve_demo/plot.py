"""Tokens per second over the number of adapters in the batch, as a picture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.serve_demo.measure import BASE, PEFT, POOL, Rates

FORMATS = (".png", ".svg", ".pdf")
# The colours of bench/plot.py.
LINES = {POOL: ("#D55E00", "o-"), PEFT: ("#009E73", "s-"), BASE: ("#555555", "--")}


def check_place(file: str) -> Path:
    """The path of the picture; UsageError unless it can be written."""
    path = Path(file).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot: got {file!r}, expected a name that ends in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"--plot: {file!r} is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"--plot: no folder {str(path.parent)!r}")
    try:  # permissions do not tell about read-only and special file systems
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"--plot: cannot write into {str(path.parent)!r}: {error.strerror}"
        ) from None
    return path


def draw(rates: Rates, batch: int, path: Path, title: str) -> None:
    """Draw the measurements. An older picture is replaced when the new one is complete."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for who, (colour, style) in LINES.items():
        points = sorted((d, rate) for (name, d), rate in rates.items() if name == who)
        if who == BASE:
            axes.axhline(points[0][1], color=colour, linestyle=style, label="base alone")
        elif points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=who)
    ticks = sorted({d for who, d in rates if who == POOL})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"distinct adapters among the {batch} rows")
    axes.set_ylabel("tokens/s")
    axes.set_title(title, fontsize=10, parse_math=False)  # a $ is a $
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:].lower())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
