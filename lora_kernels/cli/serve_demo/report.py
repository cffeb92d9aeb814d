"""The output of a run: memory, answers, tokens per second, and where each figure is from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from lora_kernels.cli.serve_demo.check import Checked
from lora_kernels.cli.serve_demo.measure import BASE, PEFT, POOL, Rates
from lora_kernels.cli.serve_demo.memory import PAGE, Arithmetic, size, tensor_bytes
from lora_kernels.serving import AdapterPool, Generated

SHOWN = 6  # answers


class Loaded(NamedTuple):
    """How many adapters PEFT holds, and a note about it."""

    adapters: int
    note: str


def _rows(out: Console, title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    out.print(f"\n{title}", style="bold")
    first, second = (max(len(row[i]) for row in rows) for i in range(2))
    for name, value, note in rows:
        out.print(f"  {name:<{first}}  {value:>{second}}  {note}".rstrip())


def memory(out: Console, sums: Arithmetic, pool: AdapterPool, model: Any) -> None:
    """Bytes of all adapters, as computed and as in the pool."""
    stats = pool.stats()
    each = f"{sums.width:,} x {sums.itemsize} bytes"
    needed = sums.pages + sums.tables
    same = "as computed" if stats.used_bytes == needed else f"{stats.used_bytes - needed:+} bytes"
    weights = tensor_bytes(model.parameters())
    rows = [
        ("A and B, computed", size(sums.values), f"{sums.adapters} x {sums.rank} ranks x {each}"),
        (
            "pages, computed",
            size(sums.pages),
            f"{sums.adapters} x {sums.pages_each} pages x {PAGE} ranks x {each}",
        ),
        ("tables, computed", size(sums.tables), f"{len(sums.shapes)} layers"),
        ("the pool's account", size(stats.used_bytes), f"in use, {same}"),
        ("", size(stats.device_bytes), "set aside"),
        (
            "merged models, computed",
            size(sums.adapters * weights),
            f"{sums.adapters} x {size(weights)}",
        ),
    ]
    _rows(out, f"memory of {stats.loaded} adapters", rows)


def answers(out: Console, shown: Mapping[str, str], generated: Generated, checked: Checked) -> None:
    """The batch's answers, and the result of the check."""
    right = checked.rows - len(checked.wrong)
    rows = [(name, "", " ".join(text.split())) for name, text in shown.items()]
    if checked.rows > len(shown) - 1:
        rows.append((f"and {checked.rows - len(shown) + 1} more", "", ""))
    rows.append(("distinct answers", f"{len(set(generated.texts))}", f"of {checked.rows} rows"))
    _rows(out, f"one batch, {checked.rows} rows, an adapter each", rows)
    _rows(
        out,
        "the same rows against the adapter alone",
        [
            ("logits within the error budget", f"{right}", f"of {checked.rows} rows"),
            ("tokens it would choose too", f"{checked.chosen}", f"of {checked.tokens}"),
        ],
    )
    for message in checked.wrong:
        out.print(f"  {message}", style="red")


def rates(out: Console, found: Rates, loaded: Loaded, args: argparse.Namespace) -> None:
    """Tokens per second over the number of adapters in the batch."""
    base = found[BASE, 0]
    title = (
        f"tokens/s: {args.batch} rows x {args.tokens} new tokens, the prompt's time included; "
        f"median of {args.rounds}, interleaved"
    )
    rows = [("adapters in the batch", f"{POOL:>9}  {'of base':>7}  {PEFT:>9}", "")]
    for distinct in sorted(d for who, d in found if who == POOL):
        rate, peft = found[POOL, distinct], found.get((PEFT, distinct))
        theirs = f"{peft:>9.1f}" if peft is not None else f"{'-':>9}"
        rows.append((f"{distinct}", f"{rate:>9.1f}  {rate / base:>7.1%}  {theirs}", ""))
    rows.append((f"{BASE} alone", f"{base:>9.1f}" + " " * 20, ""))
    _rows(out, title, rows)
    out.print(f"  PEFT {loaded.note}")
