"""What this package promises on a CPU, declared once: ratios of medians within one run, and
what a layer keeps for its backward over what it must keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.cases import BOTH, FWD, WHOLE, Case
from bench.costmodel import saved_bytes
from bench.model_suite import NEW, PREFILL, TRAINED, models, whole_case
from bench.suites import STEP

OURS = "ours:native"
STEP_OURS = "ours"
FLOOR = "floor"
NEEDED = "x and s"
SELF = "ours, on"


@dataclass(frozen=True)
class Target:
    """`ours` on the case takes at most `at_most` times the peer's time (or memory).

    `peer` is a provider, or "floor": the least time by the cost model and the machine's limits, or
    "x and s": of what autograd keeps between forward and backward ("saved", counted by hooks), what
    the cost model says cannot be left out; or "ours, on": ours on another case, `than`. `row` says
    which promise of suite `models` it is a case of.
    """

    case: Case
    peer: str
    at_most: float
    ours: str = OURS
    what: str = "time"
    than: Case | None = None
    row: str = ""

    @property
    def against(self) -> str:
        """The peer in words."""
        return self.peer if self.than is None else f"{self.peer} {self.than.name}"


@dataclass(frozen=True)
class Reached:
    """A target and what a run reached; `ratio` is None where the run does not say."""

    target: Target
    ratio: float | None

    @property
    def met(self) -> bool | None:
        return None if self.ratio is None else self.ratio <= self.target.at_most


def _linear(m: int, direction: str = FWD) -> Case:
    return Case("nf4_linear", "square-4096", m, direction)


def _lora(op: str, m: int, p: float, adapter: str) -> Case:
    return Case(op, "square-4096", m, BOTH, 16, p, adapter_dtype=adapter)


def _served(
    tokens: int,
    adapters: int,
    r: int = 16,
    *,
    base: bool = False,
    layer: str = "square-4096",
    loaded: int | None = None,
    mixed: bool = False,
) -> Case:
    """The adapters' part alone of a batch, or over a base layer."""
    op, count = "gather_lora" if base else "gather_lora_add", adapters if loaded is None else loaded
    return Case(op, layer, tokens, FWD, r, adapters=adapters, loaded=count, mixed=mixed)


_SMALL = "smollm2-135m.gate_proj"

TARGETS: tuple[Target, ...] = (
    Target(_linear(1), "bnb-eval", 0.75),
    Target(_linear(1), "dense", 0.40),
    Target(_linear(1), FLOOR, 1.25),
    Target(_linear(8), "bnb-eval", 0.30),
    Target(_linear(8), "dense", 0.70),
    Target(_linear(32), "bnb-eval", 0.15),
    Target(_linear(512), "bnb-eval", 0.10),
    Target(_linear(512), "bnb-train", 0.60),
    Target(_linear(512), "dense", 0.95),
    Target(_linear(2048), "bnb-eval", 0.08),
    Target(_linear(2048), "bnb-train", 0.75),
    Target(_linear(2048), "dense", 0.95),
    Target(_linear(512, BOTH), "bnb-train", 0.50),
    Target(_linear(512, BOTH), "dense", 1.00),
    Target(_linear(2048, BOTH), "bnb-train", 0.75),
    Target(_linear(2048, BOTH), "dense", 1.00),
    *(Target(_lora("lora_linear", 2048, 0.0, a), "dense", 1.10) for a in ("bf16", "fp32")),
    *(Target(_lora("lora_linear", 2048, 0.05, a), "dense", 1.15) for a in ("bf16", "fp32")),
    *(Target(_lora("nf4_lora_linear", 512, 0.05, a), "peft+bnb", 0.35) for a in ("bf16", "fp32")),
    *(Target(_lora("nf4_lora_linear", 2048, 0.05, a), "peft+bnb", 0.45) for a in ("bf16", "fp32")),
    *(
        Target(_lora("lora_linear", 2048, p, a), NEEDED, 1.00, what="saved")
        for p in (0.0, 0.05)
        for a in ("bf16", "fp32")
    ),
    *(
        Target(_lora("nf4_lora_linear", m, 0.05, a), NEEDED, 1.00, what="saved")
        for m in (512, 2048)
        for a in ("bf16", "fp32")
    ),
    Target(Case("nf4_dequantize", "square-4096", 0), "bnb-dequantize", 0.40),
    Target(Case("nf4_quantize", "square-4096", 0), "bnb-quantize", 0.05),
    Target(_served(64, 64), "torch", 0.33),
    Target(_served(64, 64), FLOOR, 1.30),
    Target(_served(64, 64, base=True), "peft-mixed", 0.10),
    Target(_served(64, 64, base=True, layer=_SMALL), "peft-mixed", 0.10),
    Target(_served(64, 64, 32, mixed=True), SELF, 1.15, than=_served(64, 64, 32)),
    Target(_served(512, 4, base=True), "dense", 1.15),
    Target(_served(64, 0, loaded=64, base=True), "dense", 1.01),
    Target(_served(64, 64, loaded=1000), SELF, 1.05, than=_served(64, 64)),
    Target(STEP, "peft+bnb", 0.50, STEP_OURS),
    Target(STEP, "peft", 1.00, STEP_OURS),
    Target(STEP, "peft+bnb", 1.00, STEP_OURS, "memory"),
    Target(STEP, "peft", 1.00, STEP_OURS, "memory"),
)

LAYER, LORA, QLORA = "ours:layer", "ours-dense", "ours"
SMALL_BYTES = 4_000_000  # of a bf16 weight
WIDE, MIDDLE = 2048, 576  # of the narrower side of a weight


def _model_targets() -> Iterator[Target]:
    """Suite `models`, row by row. A rate of at least c times a peer's is a time of at most 1/c."""
    cases = list(models())
    layers = [c for c in cases if c.op in ("lora_linear", "nf4_lora_linear")]
    for c in layers:
        narrow, small = min(c.n, c.k), 2 * c.n * c.k < SMALL_BYTES
        if c.op == "lora_linear" and not c.backward and c.m <= 8:
            row = f"LoRA forward, M ≤ 8, weight {'under' if small else 'from'} 4 MB"
            yield Target(c, "dense", 0.80 if small else 1.05, LAYER, row=row)
        elif c.op == "lora_linear" and not c.backward:
            wide = narrow >= MIDDLE
            row = f"LoRA forward, M ≥ 64, K or N {'from' if wide else 'under'} {MIDDLE}"
            yield Target(c, "dense", 1.15 if wide else 1.35, LAYER, row=row)
        elif c.op == "lora_linear" and c.m >= 1024:
            size, most = next(
                found
                for least, found in (
                    (WIDE, (f"from {WIDE}", 1.15)),
                    (MIDDLE, (f"from {MIDDLE}", 1.35)),
                    (0, (f"under {MIDDLE}", 1.80)),
                )
                if narrow >= least
            )
            row = f"LoRA forward + backward, M ≥ 1024, K or N {size}"
            yield Target(c, "dense", most, LAYER, row=row)
        elif c.op == "nf4_lora_linear" and not c.backward and c.m <= 8:
            for peer, most in (("dense", 0.50), ("bnb-base", 0.80)):
                yield Target(c, peer, most, LAYER, row=f"NF4 + LoRA forward, M ≤ 8, over {peer}")
    for c in cases:
        whole = c.op in WHOLE
        row = f"never slower than PEFT, {'whole models' if whole else 'layers'}"
        pairs = ((LORA, "peft"), (QLORA, "peft+bnb"))
        for ours, peer in pairs if whole else [(LAYER, pairs[c.is_quantised][1])]:
            yield Target(c, peer, 1.00, ours, row=row)
    small_model, large_model = "smollm2-135m", "llama-3.2-1b"
    for op, m, model, ours, peer, at_least in (
        ("generate", NEW, small_model, LORA, "dense", 1.2),
        ("generate", NEW, small_model, QLORA, "dense", 1.5),
        ("generate", NEW, small_model, QLORA, "bnb", 1.3),
        ("generate", NEW, large_model, QLORA, "dense", 2.5),
        ("generate", NEW, large_model, QLORA, "llama.cpp-q4_0+lora", 0.7),
        ("generate", NEW, small_model, f"{LORA}+compile", "llama.cpp-bf16", 0.75),
        ("generate", NEW, small_model, f"{QLORA}+compile", "llama.cpp-q4_0", 0.55),
        ("prefill", PREFILL, small_model, LORA, "dense", 0.90),
        ("prefill", PREFILL, small_model, QLORA, "dense", 0.85),
        ("step", TRAINED, small_model, QLORA, "unsloth", 1 / 0.40),
    ):
        row = f"{op}, {model}: {ours}, at least {at_least:g} × {peer}'s tokens/s"
        yield Target(whole_case(op, model, m), peer, 1 / at_least, ours, row=row)


MODEL_TARGETS: tuple[Target, ...] = tuple(_model_targets())


def reached(doc: dict[str, Any], targets: Sequence[Target] = TARGETS) -> list[Reached]:
    """Every target with what the run reached: the median of the ratios within its rounds."""
    from bench.runner import paired_ratio

    rows = {(r["case"], r["provider"]): r for r in doc["rows"]}
    found = []
    for target in targets:
        ours = rows.get((target.case.name, target.ours))
        peer = rows.get((target.case.name, target.peer))
        ratio = None
        if target.than is not None:
            other = rows.get((target.than.name, target.ours))
            ratio = ours["p50"] / other["p50"] if ours is not None and other is not None else None
        elif ours is not None and target.peer == FLOOR:
            ratio = ours["over_floor"]
        elif ours is not None and target.peer == NEEDED:
            kept = ours["saved_bytes"]
            ratio = None if kept is None else kept / saved_bytes(target.case)
        elif ours is not None and peer is not None:
            if target.what == "memory":
                mine, theirs = ours["peak_bytes"], peer["peak_bytes"]
                ratio = mine / theirs if mine is not None and theirs else None
            elif len(ours["samples"]) == len(peer["samples"]):
                ratio = paired_ratio(ours["samples"], peer["samples"])
        found.append(Reached(target, ratio))
    return found


def of_suite(doc: dict[str, Any], *, measured: bool = False) -> list[Table]:
    """What the run's suite promises and what it reached, as tables.

    Args:
        measured: leave out what the run does not say.
    """
    suite, tables = doc["settings"]["suite"], []

    def known(targets: Sequence[Target]) -> list[Reached]:
        return [r for r in reached(doc, targets) if r.ratio is not None or not measured]

    if suite != "models":
        tables.append(table(known(TARGETS)))
    if suite in ("models", "full"):
        found = known(MODEL_TARGETS)
        missed = [r for r in found if r.met is False]
        tables += [by_row(found), *([table(missed)] if missed else [])]
    return tables


def by_row(found: list[Reached]) -> Table:
    """One line a promise: how many of its cases keep it, and the one that is furthest off."""
    out = Table(title="suite models: ours / peer, in time", title_justify="left")
    for heading in ("promise", "at most", "cases", "met", "furthest", "on", ""):
        out.add_column(heading, overflow="fold")
    for row in dict.fromkeys(r.target.row for r in found):
        own = [r for r in found if r.target.row == row]
        known = [(r.ratio, r) for r in own if r.ratio is not None]
        worst = max(known, key=lambda pair: pair[0], default=None)
        met = sum(r.met is True for r in own)
        verdict = "not measured" if not known else "met" if met == len(known) else "missed"
        out.add_row(
            row,
            f"{own[0].target.at_most:.2f}",
            f"{len(known)} of {len(own)}",
            str(met),
            f"{worst[0]:.2f}" if worst else "",
            worst[1].target.case.name if worst else "",
            verdict,
            style={"met": "green", "missed": "red"}.get(verdict, "dim"),
        )
    return out


def table(found: list[Reached]) -> Table:
    """Target, reached, and whether that is enough."""
    out = Table(title="targets: ours / peer", title_justify="left")
    out.add_column("case", overflow="fold")
    out.add_column("against", overflow="fold")
    for heading in ("of", "at most", "reached", ""):
        out.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    words = {True: "met", False: "not met", None: "not measured"}
    for r in found:
        out.add_row(
            r.target.case.name,
            r.target.against,
            r.target.what,
            f"{r.target.at_most:.2f}",
            "" if r.ratio is None else f"{r.ratio:.2f}",
            words[r.met],
            style={True: "green", False: "red", None: "dim"}[r.met],
        )
    return out
