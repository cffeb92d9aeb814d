"""The loss curves as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, correction, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        correction = weight * correction + (1 - weight)
        result.append(average / correction)
    return result


def loss_curves(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss, held-out loss and learning rate over the steps into a PNG.

    Args:
        records: the run's log.
        path: the picture; an older one is replaced when the new one is complete.
        title: a line above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r for r in records if "loss" in r]
    held_out = [r for r in records if "held_out_loss" in r]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    x = [r["step"] for r in steps]
    losses = [r["loss"] for r in steps]
    top.plot(x, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    top.plot(x, smooth(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        top.plot(
            [r["step"] for r in held_out],
            [r["held_out_loss"] for r in held_out],
            "o-",
            color="tab:orange",
            label="held out",
        )
    top.set_ylabel("loss (nats per token)")
    top.set_title(title, parse_math=False)  # a $ in a path is a $
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot(x, [r["lr"] for r in steps], color="tab:green")
    bottom.set_ylabel("lr")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
