"""Which block sizes of the CPU kernels are fastest on this machine: coordinate descent.

One size at a time: every candidate is a provider of `runner.run_case`, so that it is verified and
timed in the same rounds as the value in force, which it replaces only where it is clearly faster
over all cases that read the size. No size changes a bit of a result.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.cases import BOTH, FWD, Case
from bench.data import CaseData
from bench.providers import Prepared, Provider, ours
from bench.report import seconds, size
from bench.runner import OK, Row, Settings, paired_ratio, run_case
from lora_kernels.dispatch import native
from tools.records import commit, write_atomic

Sizes = dict[str, int]
KIB, MIB = 1 << 10, 1 << 20
LEAST_GAIN = 0.02
PASSES = 2  # the second sees what the first one changed, if it did

# Both bases (the sizes of each are its own), both directions, and every M with each of them.
_SQUARE, _KV = "square-4096", "llama-3.1-8b.k_proj"
CASES = (
    Case("nf4_lora_linear", _SQUARE, 32, BOTH, 16),
    Case("nf4_lora_linear", _SQUARE, 512, FWD, 16),
    Case("lora_linear", _SQUARE, 2048, BOTH, 16),
    Case("lora_linear", _KV, 32, FWD, 16),
    Case("lora_linear", _KV, 512, BOTH, 16),
    Case("nf4_lora_linear", _KV, 2048, BOTH, 16),
)


TILES = ("amx", "avx512_bf16")  # instruction sets with products of bf16 tiles


@dataclass(frozen=True)
class Knob:
    """One block size, the values to try, and who reads it: products on bf16 tiles or on vectors, of
    a quantised base, a dense one, or any (None)."""

    name: str
    values: tuple[int, ...]
    on_tiles: bool = True
    quantised: bool | None = None

    def read_by(self, case: Case, isa: str) -> bool:
        if self.on_tiles != (isa in TILES and case.dtype == "bf16"):
            return False
        return self.quantised in (None, case.is_quantised)


KNOBS = (
    Knob("block_panels", (8, 16, 24, 32, 64)),
    Knob("nf4_k_tiles", (8, 12, 16, 20, 24, 32), quantised=True),
    Knob("nf4_sum_bytes", tuple(n * KIB for n in (128, 256, 512, 1024, 2048)), quantised=True),
    Knob("dense_k_tiles", (24, 36, 48, 72, 128), quantised=False),
    Knob("dense_sum_bytes", tuple(n * MIB for n in (1, 2, 4, 8, 16)), quantised=False),
    Knob("activation_bytes", tuple(n * MIB for n in (4, 8, 16, 32))),
    Knob("packed_most_rows", (192, 384, 768, 1536), on_tiles=False),
    Knob("packed_bytes", tuple(n * MIB for n in (4, 8, 16, 32, 64)), on_tiles=False),
    Knob("packed_fewest_rows", (48, 96, 192, 384), on_tiles=False),
)


@dataclass(frozen=True)
class Span:
    """Geometric means over the cases: of times in seconds, and of the time over that of the value
    in force in the same rounds."""

    p20: float
    p50: float
    p80: float
    ratio: float

    @staticmethod
    def of(rows: Sequence[Row], base: Sequence[Row]) -> Span:
        def mean(values: Iterable[float | None]) -> float:
            return statistics.geometric_mean(v or math.nan for v in values)

        return Span(
            mean(r.p20 for r in rows),
            mean(r.p50 for r in rows),
            mean(r.p80 for r in rows),
            mean(paired_ratio(r.samples, b.samples) for r, b in zip(rows, base, strict=True)),
        )

    def replaces(self, base: Span) -> bool:
        return self.ratio < 1 - LEAST_GAIN and self.p80 < base.p20


@dataclass
class Trial:
    """One knob at the values tried, `spans` of those whose results are right; `chosen` is `base`,
    the value in force before, where none was clearly faster."""

    knob: str
    base: int
    spans: dict[int, Span]
    chosen: int


@dataclass
class Tuned:
    """`values` replace the defaults; `gains` is what each took off the time when it was chosen, and
    "all" what they take off together. `rows` are all that was timed."""

    trials: list[Trial] = field(default_factory=list)
    values: Sizes = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def tune(
    settings: Settings,
    cases: Sequence[Case],
    knobs: Sequence[Knob] = KNOBS,
    tell: Callable[[Trial], object] = lambda trial: None,
) -> Tuned:
    """Start from this machine's defaults; `tell` hears of every knob when it is done.

    Raises:
        ValueError: there is no extension to tune.
    """
    if not native.available():
        raise ValueError(f"tune: needs the extension: {native.why_unavailable()}")
    default = native.default_tuning()
    sizes = dict(default)
    isa = native.current_isa()
    found = Tuned()
    for _ in range(PASSES):
        before = dict(sizes)
        for knob in knobs:
            reading = [c for c in cases if knob.read_by(c, isa)]
            if not reading:
                continue
            trial = _try(knob, sizes, reading, settings, found.rows)
            found.trials.append(trial)
            if trial.chosen != trial.base:
                sizes[knob.name] = trial.chosen
                kept = (1 - found.gains.get(knob.name, 0.0)) * trial.spans[trial.chosen].ratio
                found.gains[knob.name] = 1 - kept
            tell(trial)
        if sizes == before:
            break
    found.values = {name: v for name, v in sizes.items() if v != default[name]}
    found.gains = {name: found.gains[name] for name in found.values}
    if found.values:
        both = {"default": default, "tuned": sizes}
        spans = _measure(both, cases, settings, found.rows)
        if "tuned" in spans:
            found.gains["all"] = 1 - spans["tuned"].ratio
    return found


def _try(
    knob: Knob, sizes: Sizes, cases: Sequence[Case], settings: Settings, rows: list[Row]
) -> Trial:
    base = sizes[knob.name]
    names = {f"{knob.name}={v}": v for v in (base, *knob.values)}
    candidates = {name: {**sizes, knob.name: v} for name, v in names.items()}
    measured = _measure(candidates, cases, settings, rows)
    spans = {names[name]: span for name, span in measured.items()}
    faster = [v for v, span in spans.items() if span.replaces(spans[base])]
    return Trial(knob.name, base, spans, min(faster, key=lambda v: spans[v].ratio, default=base))


def _measure(
    candidates: dict[str, Sizes], cases: Sequence[Case], settings: Settings, rows: list[Row]
) -> dict[str, Span]:
    """The spans by name, against the first; none of a candidate with a result that is not right."""
    providers = [_provider(name, sizes) for name, sizes in candidates.items()]
    # The copies of all candidates together keep the caches honest.
    shared = replace(settings, rotate_bytes=settings.rotate_bytes // len(providers))
    timed = [run_case(case, providers, torch.device("cpu"), shared, None) for case in cases]
    rows += itertools.chain(*timed)
    by_provider = list(zip(*timed, strict=True))
    right = [all(row.status == OK for row in own) for own in by_provider]
    if not right[0]:
        return {}
    return {
        name: Span.of(own, by_provider[0])
        for name, own, ok in zip(candidates, by_provider, right, strict=True)
        if ok
    }


def _provider(name: str, sizes: Sizes) -> Provider:
    """The native backend with these block sizes."""
    usual = ours.provider("native")

    def build(data: CaseData) -> Prepared:
        prepared = usual.build(data)
        backend = prepared.context

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with backend(), native.use_tuning(sizes):
                yield

        return replace(prepared, context=context)

    return replace(usual, name=f"ours:{name}", build=build)


def table(trial: Trial) -> Table:
    """Every value tried, its time over that of the value in force, and what was chosen."""
    out = Table(title=trial.knob, title_justify="left", title_style="bold")
    for heading in ("value", "p20", "p50", "p80", "× in force", ""):
        out.add_column(heading, justify="right", no_wrap=True)
    for value, span in sorted(trial.spans.items()):
        taken = value == trial.chosen
        note = "in force" if value == trial.base else "taken" if taken else ""
        times = (seconds(t) for t in (span.p20, span.p50, span.p80))
        style = "bold" if taken else ""
        shown = size(value) if trial.knob.endswith("_bytes") else str(value)
        out.add_row(shown, *times, f"{span.ratio:.3f}", note, style=style)
    return out


def save(path: Path, tuned: Tuned) -> None:
    """Write the file that `LORA_KERNELS_TUNING` takes, whole or not at all."""
    doc: dict[str, Any] = {
        **native.tuned_for(),
        "l2_bytes": native.l2_bytes(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "values": tuned.values,
        "gains": {name: round(gain, 4) for name, gain in tuned.gains.items()},
    }
    write_atomic(path, json.dumps(doc, indent=1) + "\n")
