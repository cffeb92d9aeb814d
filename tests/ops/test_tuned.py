"""Tables of measurements for GPUs: what they decide, and what happens where they do not fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lora_kernels.ops.common import tuned
from lora_kernels.ops.common.configs import DEVICES, GEMM_CONFIGS, GENERIC, GemmConfig
from lora_kernels.ops.common.problem import OPS, STRATEGIES, Problem
from lora_kernels.ops.common.strategies import (
    MAX_SINGLE_PASS_RANK,
    choose,
    explain_config,
    one_read_parts,
    use_strategy,
)
from lora_kernels.ops.common.tuned import FORMAT, VARIABLE, Entry, Key, Table, parse, use_table
from lora_kernels.ops.packed.triton.plan import plan

GPU = "NVIDIA H100 80GB HBM3"
H100 = replace(next(d for d in DEVICES if d.name == "H100"), gpu=GPU)
A100 = replace(next(d for d in DEVICES if d.name == "A100"), gpu=GPU)
FWD, BWD = OPS
PROBLEM = Problem(2048, 4096, 4096, 16)
SMALL = GemmConfig(32, 64, 64, 4, 4)  # no choice of the model at this size
TMA = GemmConfig(64, 64, 64, 4, 4, tma=True)


def table(entry: Entry, problem: Problem = PROBLEM, op: str = FWD, gpu: str = GPU) -> Table:
    return Table(gpu, {Key.of(op, problem): entry})


def way(op: str, problem: Problem, device=H100, without: str | None = None):
    found = choose(op, problem, device, without)
    return found.strategy, found.config


MODELS = way(FWD, PROBLEM)
OTHER = next(s for s in ("epilogue", "single_pass") if s != MODELS[0])
ENTRY = Entry(OTHER, SMALL, 12e-6)


def test_the_table_comes_before_the_model_and_after_a_forced_strategy():
    assert MODELS != (OTHER, SMALL)
    with use_table(table(ENTRY)):
        assert way(FWD, PROBLEM) == (OTHER, SMALL)
        for strategy in STRATEGIES:
            with use_strategy(strategy):
                assert way(FWD, PROBLEM)[0] == strategy
        with use_table(None):
            assert way(FWD, PROBLEM) == MODELS
        assert way(FWD, PROBLEM) == (OTHER, SMALL)
    assert way(FWD, PROBLEM) == MODELS


def test_a_forced_strategy_that_is_refused_leaves_the_choice_to_the_table():
    problem = replace(PROBLEM, r=MAX_SINGLE_PASS_RANK + 1)
    entry = Entry("epilogue", SMALL, 1e-6)
    with use_table(table(entry, problem)), use_strategy("single_pass"):
        assert way(FWD, problem) == ("epilogue", SMALL)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("op", OPS)
def test_the_figures_are_the_models_for_that_tile(op, strategy):
    config = None if strategy == "addmm" else SMALL
    with use_table(None):
        only = H100 if config is None else replace(H100, tiles=(config,))
        expected = {e.strategy: e for e in explain_config(op, PROBLEM, only).estimates}
        plain = str(explain_config(op, PROBLEM, H100))
    with use_table(table(Entry(strategy, config, 12.3e-6), op=op)):
        found = choose(op, PROBLEM, H100)
        explanation = explain_config(op, PROBLEM, H100)
    assert found == replace(expected[strategy], measured=12.3e-6)
    assert explanation.chosen == found
    *lines, last = str(explanation).splitlines()
    assert [line.split()[0] for line in lines if line[1] == "*"] == [f"*{strategy}"]
    assert "measured" in last and strategy in last and "12.3 µs" in last
    assert len(plain.splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"m": 1025}, True),
        ({"m": 2047}, True),
        ({"m": 1024}, False),
        ({"m": 2049}, False),
        ({"n": 4095}, False),
        ({"k": 4095}, False),
        ({"r": 15}, False),
        ({"dtype": torch.float16}, False),
        ({"dropout": True}, False),
        ({"quantised": True}, False),
        ({"tma": False}, True),  # the tile needs no descriptors
    ],
    ids=str,
)
def test_what_a_look_up_compares(change, same):
    problem = replace(PROBLEM, **change)
    with use_table(table(Entry("epilogue", SMALL, 1e-6))):
        assert (choose(FWD, problem, H100).measured is not None) == same
        assert choose(BWD, problem, H100).measured is None


def test_the_smallest_bucket_is_one_row_and_none():
    with use_table(table(Entry("epilogue", SMALL, 1e-6), replace(PROBLEM, m=1))):
        for m, inside in ((0, True), (1, True), (2, False)):
            problem = replace(PROBLEM, m=m)
            assert (choose(FWD, problem, H100).measured is not None) == inside


@pytest.mark.parametrize(
    ("entry", "problem", "device"),
    [
        pytest.param(Entry("epilogue", TMA, 1e-6), replace(PROBLEM, tma=False), H100, id="strides"),
        pytest.param(Entry("epilogue", TMA, 1e-6), PROBLEM, A100, id="no descriptors"),
        pytest.param(
            Entry("epilogue", GEMM_CONFIGS[0], 1e-6), PROBLEM, replace(H100, shared_bytes=1 << 16),
            id="memory",
        ),
        pytest.param(
            Entry("single_pass", TMA, 1e-6), PROBLEM, replace(H100, rank_sums=False), id="sums"
        ),
        pytest.param(Entry("single_pass", SMALL, 1e-6), replace(PROBLEM, r=128), H100, id="rank"),
        pytest.param(
            Entry("epilogue", GemmConfig(48, 64, 64, 4, 3), 1e-6), PROBLEM, H100, id="unknown"
        ),
        pytest.param(
            Entry("addmm", None, 1e-6), Problem(64, 8192, 4100, 16, quantised=True), H100,
            id="slabs",
        ),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_run_here_is_not_taken(entry, problem, device):
    with use_table(None):
        expected = choose(FWD, problem, device)
    with use_table(table(entry, problem)):
        assert choose(FWD, problem, device) == expected
        assert "measured:" not in str(explain_config(FWD, problem, device))


def test_tiles_of_the_device_hold_for_the_table():
    others = tuple(t for t in GEMM_CONFIGS if t != SMALL)
    with use_table(table(ENTRY)):
        for tiles, taken in (((SMALL, TMA), True), (others, False), ((), False)):
            found = choose(FWD, PROBLEM, replace(H100, tiles=tiles))
            assert (found.measured is not None) == taken
    # Not one of ours, but one that the device names.
    own = GemmConfig(32, 32, 64, 4, 2)
    with use_table(table(Entry("epilogue", own, 1e-6))):
        assert way(FWD, PROBLEM, replace(H100, tiles=(own, SMALL))) == ("epilogue", own)


def test_a_strategy_that_the_caller_lacks_is_not_taken():
    with use_table(None):
        expected = choose(FWD, PROBLEM, H100, "addmm")
    with use_table(table(Entry("addmm", None, 1e-6))):
        assert way(FWD, PROBLEM) == ("addmm", None)
        assert choose(FWD, PROBLEM, H100, "addmm") == expected
        assert plan(FWD, PROBLEM, H100).strategy == expected.strategy


def test_packed_projections_follow_the_table():
    config = GemmConfig(64, 64, 64, 4, 4, tma=True)
    for strategy in ("epilogue", "single_pass"):
        with use_table(table(Entry(strategy, config, 1e-6))):
            found = plan(FWD, PROBLEM, H100)
        assert (found.strategy, found.config) == (strategy, config)


def test_a_planned_device_asks_no_table():
    """`bench traffic` and the interpreter plan for GPUs that are not there."""
    for device in (GENERIC, *DEVICES):
        with use_table(None):
            expected = choose(FWD, PROBLEM, device)
        with use_table(table(Entry("epilogue", SMALL, 1e-6))), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(FWD, PROBLEM, device) == expected


def test_another_gpus_table_is_warned_about_once():
    other = table(ENTRY, gpu="NVIDIA A100-SXM4-80GB")
    with use_table(other), pytest.warns(UserWarning) as caught:
        assert way(FWD, PROBLEM) == MODELS
        for m in (1, 300):
            choose(FWD, replace(PROBLEM, m=m), H100)
    (text,) = (str(w.message) for w in caught)
    assert "gpu: got 'NVIDIA A100-SXM4-80GB', expected 'NVIDIA H100 80GB HBM3'" in text
    assert VARIABLE in text and "cost model" in text


def test_every_refusal_is_named_when_none_is_left():
    device = replace(H100, shared_bytes=100)
    message = r"M=2048 N=4096.* on H100.*single_pass: no tile.*; epilogue: no tile.*; addmm: no "
    with pytest.raises(ValueError, match=message):
        choose(FWD, PROBLEM, device)
    assert explain_config(FWD, PROBLEM, device).chosen is None
    assert str(explain_config(FWD, PROBLEM, device)).count("no tile fits") == 3
    device = replace(H100, tiles=(GemmConfig(128, 256, 32, 8, 3),))
    problem = replace(PROBLEM, dtype=torch.float32)  # where this tile is too large
    with pytest.raises(ValueError, match="no strategy can run it"):
        choose(FWD, problem, device, "addmm")


def test_an_absent_strategy_is_named_too():
    device = replace(H100, rank_sums=False, tiles=(GemmConfig(128, 256, 64, 8, 3, tma=True),))
    problem = replace(PROBLEM, dropout=True)
    refused = {e.strategy for e in explain_config(BWD, problem, device).estimates if e.refusal}
    assert refused == {"single_pass", "epilogue"}
    with pytest.raises(ValueError, match="addmm: the caller does not have it"):
        choose(BWD, problem, device, "addmm")


def test_no_columns_are_no_parts_of_ds():
    for m in (1, 64, 8192):
        parts_n, parts_m = one_read_parts(m, 0, H100)
        assert parts_n == 0 and parts_m >= 1


# --- files ----------------------------------------------------------------------------------------


def item(**changes) -> dict:
    sizes = {"op": FWD, "m": 2048, "n": 4096, "k": 4096, "r": 16, "dtype": "bfloat16"}
    flags = {"dropout": False, "quantised": False}
    way = {"strategy": OTHER, "config": asdict(SMALL), "seconds": 12e-6}
    return {**sizes, **flags, **way, **changes}


def document(*items: dict, **changes) -> dict:
    triton = tuned.triton_version()
    return {"format": FORMAT, "gpu": GPU, "triton": triton, "entries": list(items), **changes}


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """The table of the environment, as in a fresh process."""
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(tuned, "_table", None)
    monkeypatch.setattr(tuned, "_was_read", False)
    yield


def test_a_file_decides(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    items = item(), item(op=BWD, strategy="addmm", config=None, seconds=1)
    path.write_text(json.dumps(document(*items, commit="whatever")))
    with unread(monkeypatch, path), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(FWD, PROBLEM, next(d for d in DEVICES if d.name == "H100"))
        assert not tuned._was_read  # a plan
        assert way(FWD, PROBLEM) == (OTHER, SMALL)
        assert way(BWD, PROBLEM) == ("addmm", None)
        path.unlink()
        assert choose(FWD, replace(PROBLEM, m=1025), H100).measured == 12e-6


def test_without_the_variable_there_is_no_table(monkeypatch):
    with unread(monkeypatch, Path()):
        monkeypatch.delenv(VARIABLE)
        assert way(FWD, PROBLEM) == MODELS
        assert tuned._was_read


CONFIG = asdict(SMALL)
BAD = [
    (None, "No such file"),
    ("", "Expecting value"),
    (b"\xff\xfe{", "decode"),
    ("[]", "holds no entries"),
    (document(entries={}), "holds no entries"),
    (document(format=2), "format: got 2, expected 1"),
    (document(triton="1.2.3"), "triton: got '1.2.3', expected "),
    (document(triton=None), "triton: got None, expected "),
    (document(gpu=None), "gpu: got None, expected a name"),
    (document(7), "entries[0]: got 7, expected an object"),
    (document(item(), item(op="glu_fwd")), "entries[1].op: got 'glu_fwd', expected one of lora_"),
    (document(item(m=0)), "entries[0].m: got 0, expected a whole number from 1"),
    (document(item(n=4096.0)), "entries[0].n: got 4096.0, expected a whole"),
    (document(item(r=-1)), "entries[0].r: got -1, expected a whole number from 0"),
    (document(item(dtype="bf16")), "entries[0].dtype: got 'bf16', expected one of float32"),
    (document(item(dropout=0.1)), "entries[0].dropout: got 0.1, expected true or false"),
    (document(item(quantised=None)), "entries[0].quantised: got None, expected true or false"),
    (document(item(strategy=["addmm"])), "entries[0].strategy: got ['addmm'], expected one of"),
    (document(item(config=None)), "entries[0].config: got None, expected block_m"),
    (document(item(config={"block_m": 64})), "entries[0].config: got {'block_m': 64}, expected"),
    (document(item(config={**CONFIG, "warps": True})), "entries[0].warps: got True, expected"),
    (document(item(config={**CONFIG, "tma": 1})), "entries[0].tma: got 1, expected true"),
    (document(item(strategy="addmm")), "expected null in addmm"),
    (document(item(seconds=0)), "entries[0].seconds: got 0, expected more than 0"),
    (document(item(seconds="1")), "entries[0].seconds: got '1', expected more than 0"),
    (document(item(m=1025), item(m=2048)), "entries[1]: a second one up to m=2048"),
]


@pytest.mark.parametrize(("content", "says"), BAD, ids=[says for _, says in BAD])
def test_a_file_that_does_not_fit_is_warned_about_once(content, says, tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with unread(monkeypatch, path), pytest.warns(UserWarning) as caught:
        assert way(FWD, PROBLEM) == MODELS
        choose(FWD, replace(PROBLEM, m=1), H100)
        explain_config(BWD, PROBLEM, H100)
    (text,) = (str(w.message) for w in caught)
    assert text.startswith(f"{VARIABLE}={path}: ") and says in text and "cost model" in text


def test_a_patch_release_of_triton_fits(monkeypatch):
    monkeypatch.setattr(tuned, "triton_version", lambda: "3.9.0")
    for version, fits in (("3.9.1", True), ("3.9.0+git1", True), ("3.90.0", False)):
        if fits:
            assert parse("", document(item(), triton=version)).gpu == GPU
            continue
        with pytest.raises(ValueError, match=r"triton: got '3.90.0', expected 3\.9"):
            parse("", document(item(), triton=version))
