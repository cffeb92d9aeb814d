"""Cases and providers as declared: consistent, unique, and the promised ones all there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.cases import BOTH, FWD, LAYERS, OPS, WHOLE, Case
from bench.costmodel import saved_bytes
from bench.model_providers import MODEL_PROVIDERS
from bench.model_suite import SUITE_MODELS, Choice
from bench.providers import PROVIDERS, select
from bench.suites import SUITES, suite
from bench.targets import (
    FLOOR,
    MODEL_TARGETS,
    NEEDED,
    SELF,
    STEP_OURS,
    TARGETS,
    by_row,
    of_suite,
    reached,
)
from lora_kernels.dispatch.registry import ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", SUITES)
def test_names_are_unique_and_tell_every_field(name: str) -> None:
    cases = suite(name)
    assert cases
    assert len({c.name for c in cases}) == len(set(cases)) == len(cases)


def test_full_holds_every_other_suite_but_smoke() -> None:
    full = {c.name for c in suite("full")}
    for name in ("targets", "scaling", "models"):
        assert {c.name for c in suite(name)} <= full


def test_a_gpus_suite_is_24_cases_and_the_same_in_tiny() -> None:
    cases, tiny = suite("gpu"), suite("gpu-tiny")
    assert len(cases) == len(tiny) == 24
    assert [(c.op, c.direction, c.dropout) for c in cases] == [
        (c.op, c.direction, c.dropout) for c in tiny
    ]
    assert max(c.n * c.k for c in tiny) < 1 << 16


def test_full_covers_the_promised_ranges() -> None:
    cases = suite("full")
    assert {c.op for c in cases} == set(OPS)
    assert {c.dtype for c in cases} == {"bf16", "fp16", "fp32"}
    assert min(c.m for c in cases if c.op == "nf4_linear") == 1
    assert max(c.m for c in cases) == 8192
    assert {8, 16, 256} <= {c.r for c in cases}
    models = {c.layer.partition(".")[0] for c in cases}
    assert {"llama-3", "qwen2", "smollm2-135m", "llama-2-7b"} <= models


@pytest.mark.parametrize(
    ("layer", "n", "k", "bias"),
    [
        ("llama-3.1-8b.down_proj", 4096, 14336, False),
        ("llama-3.1-8b.k_proj", 1024, 4096, False),
        ("llama-2-7b.gate_proj", 11008, 4096, False),
        ("qwen2.5-0.5b.k_proj", 128, 896, True),
        ("qwen2.5-7b.gate_proj", 18944, 3584, False),
        ("smollm2-135m.down_proj", 576, 1536, False),
    ],
)
def test_layers_are_the_models_own(layer: str, n: int, k: int, bias: bool) -> None:
    assert (LAYERS[layer].n, LAYERS[layer].k, LAYERS[layer].bias) == (n, k, bias)


def test_groups_are_the_layers_that_the_models_take_together() -> None:
    qkv = Case("lora_packed", "qwen2.5-7b.qkv", 1, r=16)
    assert qkv.widths == (3584, 512, 512)
    assert (qkv.n, qkv.k, qkv.bias) == (4608, 3584, True)
    mlp = Case("lora_mlp", "llama-3.1-8b.mlp", 1, r=16)
    assert [(layer.n, layer.k) for layer in mlp.layers] == [
        (14336, 4096),
        (14336, 4096),
        (4096, 14336),
    ]
    assert (mlp.widths, mlp.n, mlp.k) == ((4096,), 4096, 4096)


@pytest.mark.parametrize(
    ("op", "layer"),
    [
        ("lora_packed", "llama-3.1-8b.mlp"),
        ("lora_packed", "llama-3.1-8b.q_proj"),
        ("lora_mlp", "llama-3.1-8b.qkv"),
        ("lora_linear", "llama-3.1-8b.qkv"),
        ("glu", "llama-3.1-8b.mlp"),
    ],
)
def test_an_op_takes_its_own_kind_of_layer(op: str, layer: str) -> None:
    with pytest.raises(ValueError, match=r"^layer: got "):
        Case(op, layer, 1, r=0 if op == "glu" else 16)


def test_lora_suite_covers_the_ops_of_triton_at_the_sizes_of_a_gpu() -> None:
    """Every op family that Triton implements, forward and backward, has a case of its own."""
    cases, quantised = suite("lora"), suite("nf4")
    families = {
        name.removesuffix("_fwd").removesuffix("_bwd")
        for name, op in ops().items()
        if any(i.backend == "triton" for i in op.in_order())
    }
    measured = {c.op for c in cases}
    assert all(c.is_quantised for c in quantised)
    covered = measured | {c.op for c in quantised} | {c.op for c in suite("gather")}
    parts = {"dropout_mask", "dora_norm", "nf4_quantize_scales", "gather_lora_embed_add"}
    assert families - parts <= covered  # parts of ops that are measured
    assert measured == {"lora_linear", "lora_packed", "lora_mlp", "glu", "dora_linear"}
    for op in measured:
        own = [c for c in cases if c.op == op]
        for direction in (FWD, BOTH):
            assert {c.m for c in own if c.direction == direction} == {1, 16, 2048, 8192}
        if op != "glu":
            assert {c.r for c in own} == {16, 64}
            assert {c.dropout for c in own if c.backward} == {0.0, 0.05}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op": "conv"}, "op"),
        ({"layer": "nothing"}, "layer"),
        ({"m": -1}, "m"),
        ({"r": 0}, "r"),
        ({"dtype": "int8"}, "dtype"),
        ({"direction": "bwd"}, "direction"),
        ({"direction": "fwd"}, "dropout"),
    ],
)
def test_bad_case_names_the_field(change: dict[str, object], named: str) -> None:
    case = Case("lora_linear", "tiny", 4, BOTH, 8, 0.1)
    with pytest.raises(ValueError, match=f"^{named}: got "):
        replace(case, **change)


def test_suite_filter() -> None:
    assert [c.name for c in suite("targets", "dequantize")] == ["nf4_dequantize/square-4096/bf16"]
    with pytest.raises(ValueError, match=r"only: 'zzz' matches no case"):
        suite("targets", "zzz")
    with pytest.raises(ValueError, match="suite: got 'none'"):
        suite("none")


def test_every_op_has_a_baseline_and_ours() -> None:
    for case in suite("full"):
        if case.op in WHOLE:
            continue
        serving = [p for p in PROVIDERS if p.refusal(case, CPU) is None]
        assert any(p.ours for p in serving), case.name
        assert any(not p.ours for p in serving), case.name


def test_provider_names_are_unique_and_selectable() -> None:
    names = [p.name for p in PROVIDERS]
    assert len(set(names)) == len(names)
    assert [p.name for p in select("dense|bnb-eval")] == ["dense", "bnb-eval"]
    long, short = ([p.name for p in select(kind=k)] for k in ("long", "short"))
    assert set(long) ^ set(short) == {"compile", "ours:reference"}
    assert "compile" in long
    assert [p.name for p in select(kind="models")] == [
        *("ours:layer", "dense", "peft", "peft+bnb", "bnb-base")
    ]
    with pytest.raises(ValueError, match="providers: 'zzz' matches none"):
        select("zzz")


def test_every_op_of_the_package_is_benched() -> None:
    """A new op family must bring a case."""
    families = {name.removesuffix("_fwd").removesuffix("_bwd") for name in ops()}
    # of every case with dropout, of nf4_quantize, of linear_cross_entropy, of dora_linear,
    # of gather_lora_embed (whose part over the base it is)
    parts = {
        "dropout_mask",
        "nf4_quantize_scales",
        "cross_entropy",
        "dora_norm",
        "gather_lora_embed_add",
    }
    assert families - parts <= set(OPS) | {"lora_linear"}


def test_targets_name_measured_cases_and_providers() -> None:
    measured = {c.name for c in suite("targets")}
    assert {c.name for t in TARGETS for c in (t.case, t.than) if c is not None} == measured
    names = {p.name for p in PROVIDERS} | {FLOOR, NEEDED, SELF, "peft", "peft+bnb"}
    assert {t.peer for t in TARGETS} <= names
    for target in TARGETS:
        assert (target.peer == SELF) == (target.than is not None)
        if target.ours != STEP_OURS and target.peer not in (FLOOR, NEEDED, SELF):
            peer = next(p for p in PROVIDERS if p.name == target.peer)
            assert target.case.op in peer.ops, target
            assert peer.refuses(target.case, CPU) is None, target


def test_reached_takes_the_median_of_paired_ratios() -> None:
    target = next(t for t in TARGETS if t.peer == "bnb-eval")

    def row(provider: str, samples: list[float]) -> dict[str, object]:
        return {"case": target.case.name, "provider": provider, "samples": samples}

    doc = {"rows": [row("ours:native", [1.0, 2.0, 9.0]), row("bnb-eval", [2.0, 4.0, 3.0])]}
    for r in doc["rows"]:
        r["over_floor"] = None
    found = {r.target: r for r in reached(doc)}
    assert found[target].ratio == 0.5
    assert found[target].met
    others = [r for t, r in found.items() if t != target]
    assert all(r.ratio is None and r.met is None for r in others)


def test_reached_compares_ours_on_two_cases() -> None:
    target = next(t for t in TARGETS if t.than is not None)
    case, than = target.case.name, target.than.name
    rows = [
        {"case": c, "provider": "ours:native", "p50": p, "samples": [p]}
        for c, p in ((case, 3.0), (than, 2.0))
    ]
    for r in rows:
        r["over_floor"] = None
    found = {r.target: r.ratio for r in reached({"rows": rows})}
    assert found[target] == 1.5
    found = {r.target: r.ratio for r in reached({"rows": rows[:1]})}
    assert found[target] is None


def test_saved_bytes_are_promised_for_every_adapter_case() -> None:
    promised = {t.case.name for t in TARGETS if t.what == "saved"}
    assert promised == {c.name for c in suite("targets") if c.op.endswith("lora_linear")}
    assert len(promised) == 8


@pytest.mark.parametrize(("more", "met"), [(0, True), (-8, True), (1, False), (None, None)])
def test_reached_compares_saved_bytes_with_x_and_s(more: int | None, met: bool | None) -> None:
    """To the byte, and without a peer or a time."""
    target = next(t for t in TARGETS if t.what == "saved")
    kept = None if more is None else saved_bytes(target.case) + more
    row = {"case": target.case.name, "provider": "ours:native", "samples": [], "saved_bytes": kept}
    found = next(r for r in reached({"rows": [row]}) if r.target == target)
    assert found.met is met
    if more == 0:
        assert found.ratio == 1.0


def test_suite_models_is_every_layer_at_every_size() -> None:
    cases = suite("models")
    for model in SUITE_MODELS:
        own = [c for c in cases if c.layer.startswith(f"{model}.")]
        for op, count in (
            *(("lora_linear", 4), ("nf4_lora_linear", 4)),
            *(("lora_packed", 2), ("nf4_lora_packed", 2)),
        ):
            for direction, p in ((FWD, 0.0), (BOTH, 0.05)):
                for m in (1, 8, 64, 512, 2048):
                    found = [(c.op, c.direction, c.m, c.dropout) for c in own]
                    assert found.count((op, direction, m, p)) == count
    assert {(c.r, c.dtype, c.adapter_dtype) for c in cases} == {(16, "bf16", "fp32")}
    whole = [(c.op, c.layer, c.m) for c in cases if c.op in WHOLE]
    assert sorted(whole) == sorted(
        (op, model, m)
        for op, m in (("generate", 64), ("prefill", 512), ("step", 1024))
        for model in ("smollm2-135m", "llama-3.2-1b")
    )


def test_a_choice_of_cases() -> None:
    chosen = Choice(
        model=["smollm2-135m", "llama-3.2-1b"],
        layer=["q_proj", "down_proj"],
        tokens=[1, 8],
        kind=["lora", "qlora"],
        direction=[FWD],
    )
    cases = suite("models", None, chosen)
    assert len(cases) == 2 * 2 * 2 * 2
    assert {c.layer for c in cases} == {
        f"{m}.{p}" for m in ("smollm2-135m", "llama-3.2-1b") for p in ("q_proj", "down_proj")
    }
    (one,) = suite("models", None, Choice(model=["llama-3.2-1b"], kind=["prefill"]))
    assert one.name == "prefill/llama-3.2-1b/M512/r16/a-fp32"
    with pytest.raises(ValueError, match="--model: got gpt-2, and the suite has llama"):
        suite("models", None, Choice(model=["gpt-2"]))
    with pytest.raises(ValueError, match=r"no case of the suite fits all of \{'layer'.*'prefill'"):
        suite("models", None, Choice(layer=["qkv"], kind=["prefill"]))


def test_model_targets_name_measured_cases_and_providers() -> None:
    measured = {c.name: c for c in suite("models")}
    assert len({(t.case, t.peer, t.ours, t.row) for t in MODEL_TARGETS}) == len(MODEL_TARGETS)
    layers = {p.name: p for p in PROVIDERS}
    for target in MODEL_TARGETS:
        case = measured[target.case.name]
        assert target.row
        for name in (target.peer, target.ours):
            if case.op in WHOLE:
                assert case.op in MODEL_PROVIDERS[name].ops, target
            else:
                assert layers[name].refusal(case, CPU) is None, target
    assert {t.case.name for t in MODEL_TARGETS} == set(measured)  # PEFT, if no other


def test_promises_row_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    row = "NF4 + LoRA forward, M ≤ 8, over dense"
    own = [t for t in MODEL_TARGETS if t.row == row]

    def rows(case: str, ours: float) -> list[dict[str, object]]:
        return [
            {"case": case, "provider": p, "samples": [t], "over_floor": None}
            for p, t in (("ours:layer", ours), ("dense", 1.0))
        ]

    good, bad = (own[i].case.name for i in (0, 1))
    doc = {"settings": {"suite": "models"}, "rows": [*rows(good, 0.5), *rows(bad, 0.625)]}
    found = reached(doc, own)
    assert [r.met for r in found[:3]] == [True, False, None]
    (cells,) = zip(*(c.cells for c in by_row(found).columns), strict=True)
    assert cells == (row, "0.50", f"2 of {len(own)}", "1", "0.62", bad, "missed")
    summary, missed = of_suite(doc, measured=True)
    assert summary.row_count == 1 and missed.row_count == 1
    doc["settings"] = {"suite": "targets"}
    assert [t.title for t in of_suite(doc)] == ["targets: ours / peer"]
