"""No time of a wrong result: what the gate lets through and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.cases import BOTH, FWD, Case
from bench.data import CaseData
from bench.providers import PROVIDERS, Outputs, Prepared, Provider
from bench.runner import FAILED, OK, REFUSED, WRONG, Settings, refusal, run_case
from bench.verify import Verifier
from lora_kernels import NF4Weight
from lora_kernels.dispatch.op import BackendError

CPU = torch.device("cpu")
FAST = Settings(seconds=0.01, min_rounds=2, max_rounds=3, rotate_bytes=1 << 16)
LORA = Case("lora_linear", "tiny", 16, BOTH, 4, 0.25)
DENSE = next(p for p in PROVIDERS if p.name == "dense")
TORCH = next(p for p in PROVIDERS if p.name == "torch")
REFERENCE = next(p for p in PROVIDERS if p.name == "ours:reference")


def tampered(provider: Provider, change: Callable[[Outputs], Outputs]) -> Provider:
    """The provider with its results changed."""

    def build(data: CaseData) -> Prepared:
        prepared = provider.build(data)
        right = prepared.call
        prepared.call = lambda i: change(right(i))
        return prepared

    return Provider("tampered", provider.ops, build, ours=provider.ours)


def scaled(name: str, by: float) -> Callable[[Outputs], Outputs]:
    return lambda out: {**out, name: out[name] * by}


def verdict(provider: Provider, case: Case) -> tuple[bool, str]:
    data = CaseData(case, CPU, FAST.rotate_bytes)
    found = Verifier(data).check(provider, provider.build(data))
    return found.ok, found.note


@pytest.mark.parametrize("provider", [TORCH, REFERENCE, DENSE], ids=lambda p: p.name)
def test_right_results_pass(provider: Provider) -> None:
    assert verdict(provider, LORA) == (True, "")


@pytest.mark.parametrize("name", ["y", "dx", "da", "db"])
@pytest.mark.parametrize("provider", [TORCH, REFERENCE], ids=lambda p: p.name)
def test_every_result_is_looked_at(provider: Provider, name: str) -> None:
    ok, note = verdict(tampered(provider, scaled(name, 1.1)), LORA)
    assert not ok
    assert note.startswith(f"{name}:")


FAMILIES = {
    "packed": Case("lora_packed", "tiny.qkv", 16, BOTH, 4, 0.25),
    "packed-gate-up": Case("lora_packed", "smollm2-135m.gate_up", 5, BOTH, 4, adapter_dtype="fp32"),
    "packed-forward": Case("lora_packed", "tiny.qkv", 1, FWD, 4),
    "packed-4-bit": Case("nf4_lora_packed", "tiny.qkv", 16, BOTH, 4, 0.25, adapter_dtype="fp32"),
    "mlp": Case("lora_mlp", "tiny.mlp", 16, BOTH, 4, 0.25),
    "mlp-no-dropout": Case("lora_mlp", "tiny.mlp", 16, BOTH, 4, 0.0, "fp32", "fp32"),
    "mlp-forward": Case("lora_mlp", "tiny.mlp", 1, FWD, 4, adapter_dtype="fp32"),
    "glu": Case("glu", "tiny", 16, BOTH),
    "glu-forward": Case("glu", "tiny", 1, dtype="fp16"),
    "dora": Case("dora_linear", "tiny", 16, BOTH, 4),
    "dora-dropout": Case("dora_linear", "tiny", 16, BOTH, 4, 0.25, adapter_dtype="fp32"),
    "dora-bias": Case("dora_linear", "tiny-bias", 16, BOTH, 4, 0.0, "fp32", "fp32"),
    "embed": Case("gather_lora_embed", "tiny", 9, FWD, 8, adapters=3, loaded=5, mixed=True),
    "embed-backward": Case(
        *("gather_lora_embed", "tiny", 9, BOTH, 8), adapters=3, loaded=5, adapter_dtype="fp32"
    ),
    "embed-fp32-pages": Case(
        *("gather_lora_embed", "tiny", 9, FWD, 8), adapters=5, loaded=5, adapter_dtype="fp32"
    ),
    "dora-forward": Case("dora_linear", "tiny-bias", 1, FWD, 4, dtype="fp16"),
}
PAIRS = [
    pytest.param(provider, case, id=f"{name}-{provider.name}")
    for name, case in FAMILIES.items()
    for provider in PROVIDERS
    if provider.refusal(case, CPU) is None and provider.name != "compile"  # which takes too long
]


@pytest.mark.parametrize(("provider", "case"), PAIRS)
def test_families_are_right_by_every_provider(provider: Provider, case: Case) -> None:
    try:
        assert verdict(provider, case) == (True, "")
    except BackendError as error:
        pytest.skip(f"{provider.name}: {refusal(error)}")


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("packed", "y0 y1 y2 dx da0 db0 da1 db1 da2 db2"),
        ("mlp", "y dx da0 db0 da1 db1 da2 db2"),
        ("glu", "y dx dup"),
        ("embed", "y"),
        ("embed-backward", "y da db"),
        ("dora-dropout", "y dx da db dmagnitude"),
    ],
)
def test_every_result_of_a_family_is_looked_at(name: str, results: str) -> None:
    case, data = FAMILIES[name], CaseData(FAMILIES[name], CPU, 1)
    assert list(TORCH.build(data).call(0)) == results.split()
    for provider in (TORCH, REFERENCE):
        for result in results.split():
            ok, note = verdict(tampered(provider, scaled(result, 1.1)), case)
            assert not ok, result
            assert note.startswith(f"{result}:")


@pytest.mark.parametrize("name", ["packed", "mlp"])
def test_projections_have_masks_of_their_own(name: str) -> None:
    def taking(order: tuple[int, ...]) -> Provider:
        def build(data: CaseData) -> Prepared:
            prepared = REFERENCE.build(data)
            masks = prepared.masks
            assert masks is not None

            def chosen() -> list[torch.Tensor]:
                own = masks()
                return [own[i] for i in order]

            prepared.masks = chosen
            return prepared

        return Provider("chosen", REFERENCE.ops, build, ours=True)

    assert verdict(taking((0, 1, 2)), FAMILIES[name])[0]
    assert not verdict(taking((0, 0, 2)), FAMILIES[name])[0]


def test_another_magnitude_is_wrong() -> None:
    case = FAMILIES["dora-forward"]
    moved = CaseData(case, CPU, 1)
    moved.magnitude = moved.magnitude * 1.05
    found = Verifier(CaseData(case, CPU, 1)).check(TORCH, TORCH.build(moved))
    assert not found.ok
    assert found.note.startswith("y:")


def test_ours_have_the_stricter_gate() -> None:
    """bf16, off by two percent: a peer's own arithmetic may be, ours may not."""
    case = Case("lora_linear", "tiny", 16, BOTH, 4)
    assert verdict(tampered(TORCH, scaled("y", 1.02)), case)[0]
    assert not verdict(tampered(REFERENCE, scaled("y", 1.02)), case)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda out: {k: v for k, v in out.items() if k != "da"}, "gives no da"),
        (lambda out: {**out, "y": out["y"] * float("nan")}, "y: not finite"),
        (lambda out: {**out, "dx": out["dx"].T}, "dx: shape"),
        (lambda out: {**out, "y": torch.zeros_like(out["y"])}, "y: rms error"),
    ],
    ids=["missing", "nan", "shape", "zeros"],
)
def test_wrong_kinds(change: Callable[[Outputs], Outputs], says: str) -> None:
    ok, note = verdict(tampered(TORCH, change), LORA)
    assert not ok
    assert note.startswith(says)


def test_a_forgotten_mask_is_wrong() -> None:
    """Dropout applied without its factor: right in shape, wrong in value."""

    def build(data: CaseData) -> Prepared:
        prepared = TORCH.build(data)
        masks = prepared.masks
        assert masks is not None
        prepared.masks = lambda: [(mask != 0).double() for mask in masks()]
        return prepared

    assert not verdict(Provider("other", TORCH.ops, build), LORA)[0]


def test_codecs_of_ours_are_bit_exact() -> None:
    def flip(out: Outputs) -> Outputs:
        packed = out["packed"].clone()
        packed[0] ^= 1
        return {**out, "packed": packed}

    case = Case("nf4_quantize", "tiny", 0)
    assert verdict(REFERENCE, case)[0]
    ok, note = verdict(tampered(REFERENCE, flip), case)
    assert not ok
    assert note.startswith("packed: differs")
    # One code in 12 288 is within a peer's freedom, hundreds are not.
    peer = Provider("peer", REFERENCE.ops, tampered(REFERENCE, flip).build)
    assert verdict(peer, case)[0]
    zeros = tampered(REFERENCE, lambda out: {**out, "packed": out["packed"] * 0})
    assert not verdict(Provider("peer", zeros.ops, zeros.build), case)[0]

    nudge = tampered(REFERENCE, lambda out: {"w": out["w"].nextafter(torch.tensor(9.0))})
    fp32 = Case("nf4_dequantize", "tiny", 0, dtype="fp32")
    assert not verdict(nudge, fp32)[0]


def test_wrong_and_refusing_providers_get_no_time() -> None:
    def raising(data: CaseData) -> Prepared:
        raise RuntimeError("no such kernel\nand more")

    wrong = tampered(TORCH, scaled("y", 2.0))
    providers = [
        DENSE,
        wrong,
        Provider("raises", wrong.ops, raising),
        Provider("refuses", wrong.ops, TORCH.build, lambda case, device: "not today"),
        Provider("other-op", ("nf4_linear",), TORCH.build),
    ]
    rows = {r.provider: r for r in run_case(LORA, providers, CPU, FAST, None)}
    assert list(rows) == ["dense", "tampered", "raises", "refuses"]
    assert [r.status for r in rows.values()] == [OK, WRONG, FAILED, REFUSED]
    assert rows["dense"].p50 is not None
    assert rows["raises"].note == "RuntimeError: no such kernel"
    assert rows["refuses"].note == "not today"
    for name in ("tampered", "raises", "refuses"):
        assert rows[name].p50 is None
        assert rows[name].samples == []


def test_a_result_that_goes_wrong_while_timed_loses_its_time() -> None:
    def build(data: CaseData) -> Prepared:
        prepared = DENSE.build(data)
        right, calls = prepared.call, [0]

        def call(i: int) -> Outputs:
            calls[0] += 1
            if calls[0] == 6:  # a kernel that writes into its weight
                data.dense_copies[0].zero_()
            return right(i)

        prepared.call = call
        return prepared

    (row,) = run_case(LORA, [Provider("destroys", DENSE.ops, build)], CPU, FAST, None)
    assert row.status == WRONG
    assert row.note.startswith("after timing: ")
    assert row.p50 is None


def test_copies_do_not_share_memory() -> None:
    data = CaseData(Case("nf4_linear", "tiny", 1), CPU, 1 << 16)
    weights = data.quantised_copies() + data.quantised_copies()
    assert len(weights) > 10
    assert len({w.packed.data_ptr() for w in weights}) == len(weights)
    assert len({w.data_ptr() for w in data.dense_copies}) == len(data.dense_copies)
    assert isinstance(weights[0], NF4Weight)
