"""`python -m bench tune` from end to end on tiny cases, and what it chooses on made-up times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench import tune
from bench.__main__ import main
from bench.cases import BOTH, Case
from bench.providers import Provider
from bench.runner import OK, WRONG, Row, Settings
from lora_kernels.dispatch import native
from lora_kernels.dispatch.tuning import VARIABLE

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"needs the extension: {native.why_unavailable()}"
)

TINY = (
    Case("nf4_lora_linear", "tiny", 33, BOTH, 4),
    Case("lora_linear", "tiny", 40, r=4),
)
USUAL = (9.0, 10.0, 11.0)


def test_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "CASES", TINY)
    path = tmp_path / "tuning.json"
    before = native.tuning()
    assert main(["tune", "--threads", "1", "--seconds", "0.001", "--output", str(path)]) == 0
    assert native.tuning() == before
    out = capsys.readouterr().out
    assert "in force" in out and " ok\n" in out and "tuning.json" in out
    assert [p.name for p in tmp_path.iterdir()] == ["tuning.json"]
    doc = json.loads(path.read_text())
    assert doc.keys() - native.tuned_for().keys() == {
        *("l2_bytes", "threads", "commit", "values", "gains")
    }
    assert doc["threads"] == 1 and doc["l2_bytes"] == native.l2_bytes()
    assert doc["gains"].keys() - {"all"} == doc["values"].keys()
    monkeypatch.setenv(VARIABLE, str(path))
    with native.use_tuning({}):
        assert native._load.__wrapped__().reason is None
        assert native.tuning() == {**native.default_tuning(), **doc["values"]}


def test_the_cases_read_every_size() -> None:
    """On one kind of machine or the other."""
    for isa in (*tune.TILES, "avx2"):
        for knob in tune.KNOBS:
            reading = [c for c in tune.CASES if knob.read_by(c, isa)]
            assert bool(reading) == (knob.on_tiles == (isa in tune.TILES)), knob.name
    assert {k.name for k in tune.KNOBS} == set(native.tuning())


@pytest.mark.parametrize("knob", tune.KNOBS, ids=lambda k: k.name)
def test_every_value_fits(knob: tune.Knob) -> None:
    for v in knob.values:
        with native.use_tuning({knob.name: v}):
            assert native.tuning()[knob.name] == v


def sizes() -> tuple[int, int, int]:
    """Block sizes: the default of this machine, and two others."""
    default = native.default_tuning()["block_panels"]
    one, other = [v for v in (8, 32, 64) if v != default][:2]
    return default, one, other


def chosen(monkeypatch: pytest.MonkeyPatch, samples: dict[int, tuple[float, ...]]) -> tune.Tuned:
    """Tune one size with these samples of its values, which are p20, p50 and p80 too; no samples
    are a wrong result. Others take `USUAL`, the tuned sizes 5 s throughout."""
    names = {"default": USUAL, "tuned": (5.0, 5.0, 5.0)}
    names |= {f"block_panels={v}": times for v, times in samples.items()}

    def run_case(case: Case, providers: Iterable[Provider], *args: object) -> list[Row]:
        rows = []
        for provider in providers:
            times = names.get(provider.name.removeprefix("ours:"), USUAL)
            row = Row(case, provider.name, OK if times else WRONG, samples=list(times))
            row.p20, row.p50, row.p80 = times or (None,) * 3
            rows.append(row)
        return rows

    monkeypatch.setattr(tune, "run_case", run_case)
    on_tiles = native.current_isa() in tune.TILES
    return tune.tune(Settings(), TINY, (tune.Knob("block_panels", sizes()[1:], on_tiles),))


def test_the_fastest_of_the_clearly_faster_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    default, one, other = sizes()
    found = chosen(monkeypatch, {one: (7.0, 8.0, 8.5), other: (7.0, 7.5, 8.0)})
    assert found.values == {"block_panels": other}
    assert found.gains == pytest.approx({"block_panels": 0.25, "all": 0.5})
    first, second = found.trials
    assert (first.base, first.chosen) == (default, other)
    assert (second.base, second.chosen) == (other, other)


@pytest.mark.parametrize(
    "times",
    [
        pytest.param((6.0, 7.0, 9.5), id="overlapping"),
        pytest.param((10.9, 11.0, 11.5), id="slower"),
        pytest.param((), id="wrong"),
    ],
)
def test_what_is_not_clearly_faster_replaces_nothing(
    times: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sizes()[1]
    found = chosen(monkeypatch, {one: times})
    assert found.values == found.gains == {}
    assert len(found.trials) == 1
    assert (one in found.trials[0].spans) == bool(times)


def test_a_small_gain_replaces_nothing() -> None:
    base = tune.Span(9.9, 10.0, 10.1, 1.0)
    assert tune.Span(9.7, 9.75, 9.8, 0.975).replaces(base)
    assert not tune.Span(9.84, 9.85, 9.86, 0.985).replaces(base)


def test_nothing_is_chosen_against_a_wrong_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default, one, _ = sizes()
    found = chosen(monkeypatch, {one: (1.0, 1.0, 1.0), default: ()})
    assert found.values == {} and found.trials[0].spans == {}


def test_without_the_extension_there_is_nothing_to_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_unavailable", lambda: "it was not built")
    with pytest.raises(ValueError, match="needs the extension: it was not built"):
        tune.tune(Settings(), TINY)
    assert main(["tune", "--seconds", "0"]) == 2
    assert "seconds: got 0.0" in capsys.readouterr().err
