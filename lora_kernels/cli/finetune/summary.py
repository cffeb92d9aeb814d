"""The end of a run: generations, the final table and summary.json."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_kernels.cli.finetune.meter import MIB


def duration(seconds: float) -> str:
    """Seconds as text: 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def show_generations(console: Console, generations: list[dict[str, str]]) -> None:
    """Prompt, reference, and the answers before and after."""
    for item in generations:
        console.print(f"\n{_last_line(item['prompt'])}", style="bold")
        for name in ("reference", "before", "after"):
            console.print(Text.assemble("  ", (f"{name:<10}", "dim"), " ".join(item[name].split())))


def _last_line(prompt: str) -> str:
    """The user's text in a chat prompt, without the template's marks."""
    lines = [re.sub(r"<\|.*?\|>.*", "", line).strip() for line in prompt.splitlines()]
    return next((line for line in reversed(lines) if line), prompt)


def table(result: dict[str, Any]) -> Table:
    """The final table, from a run's `summary.json`."""
    view = Table(title=Text(f"{result['model']}: {result['title']}"), show_header=False)
    view.add_column(style="bold")
    view.add_column(justify="right")
    trainable, total = result["trainable_parameters"], result["total_parameters"]
    rows = [
        ("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})"),
        ("weights in memory", _bytes_change(result)),
        ("steps", f"{result['steps']}"),
        ("training throughput", f"{result['tokens_per_second']:.0f} tokens/s"),
        ("training time", duration(result["train_seconds"])),
        ("peak memory in training", f"{result['peak_bytes'] / MIB:.0f} MiB"),
        ("training loss, first / last tenth", _ends(result["train_losses"])),
    ]
    if result["held_out_before"] is not None:
        before, after = result["held_out_before"], result["held_out_after"]
        rows.append(("held-out loss, before → after", f"{before:.4f} → {after:.4f}"))
    if "reload" in result:
        same = result["reload"]
        rows.append(
            (
                "logits after saving and reloading",
                "equal, bit for bit"
                if same["equal"]
                else f"differ by up to {same['max_difference']:.3g}",
            )
        )
    if result.get("held_out_merged") is not None:
        rows.append(("held-out loss, merged model", f"{result['held_out_merged']:.4f}"))
    rows.append(("time in all", duration(result["total_seconds"])))
    for row in rows:
        view.add_row(*row)
    return view


def _bytes_change(result: dict[str, Any]) -> str:
    before, after = result["bytes_before"], result["bytes_after"]
    return f"{before / MIB:.0f} → {after / MIB:.0f} MiB ({result['base']})"


def _ends(losses: list[float]) -> str:
    if not losses:
        return "none"
    n = max(1, len(losses) // 10)
    return f"{sum(losses[:n]) / n:.4f} / {sum(losses[-n:]) / n:.4f}"
