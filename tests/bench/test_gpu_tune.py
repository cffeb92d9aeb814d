"""`python -m bench tune --device cuda` without a GPU: on made-up times; and that what it measures
is what it asked for, checked."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import tune
from bench.gpu.measurer import Candidate, Measurer, Point, Timing
from bench.runner import FAILED, OK, WRONG, Settings
from lora_kernels import use_backend
from lora_kernels.dispatch.op import Implementation
from lora_kernels.dispatch.registry import ops
from lora_kernels.ops.common import tuned
from lora_kernels.ops.common.configs import DEVICES, GEMM_CONFIGS, GENERIC, GemmConfig
from lora_kernels.ops.common.launch import Executor, planned_device, use_executor
from lora_kernels.ops.common.problem import STRATEGIES
from lora_kernels.ops.common.strategies import choose
from tests.ops.variants import interpreting

GPU = "Imaginary GPU 9000"
H100 = replace(next(d for d in DEVICES if d.name == "H100"), gpu=GPU)
POINT = Point("lora_linear_fwd", (2048, 4096, 4096, 16))
SHAPE = ["64,64,96,8"]
FAST = Settings(seconds=0.0, min_rounds=3)


class OnCpu(Executor):
    """Takes CPU tensors, as if they were on `GPU`."""

    on_cpu = True
    device = replace(GENERIC, gpu=GPU, tiles=(GemmConfig(64, 64, 32, 4, 2), GEMM_CONFIGS[-1]))


Times = Callable[[Point, Candidate], float | str]


class Fake:
    """A `tune.Measure` of made-up seconds, or a status; keeps what it was asked."""

    def __init__(self, times: Times, alone: Times | None = None) -> None:
        self.times, self.alone = times, alone or times
        self.asked: list[tuple[Point, list[Candidate]]] = []

    def __call__(self, point: Point, candidates: Sequence[Candidate]) -> list[Timing]:
        self.asked.append((point, list(candidates)))
        found = []
        for c in candidates:
            # A point's second call compares two.
            of = self.alone if len(candidates) == 2 else self.times
            time = of(point, c)
            ok = isinstance(time, float)
            samples = [time] * 3 if ok else []
            found.append(Timing(c, OK if ok else time, "" if ok else "because", samples))
        return found


def test_the_shapes_are_those_of_real_layers() -> None:
    found = tune.points()
    assert len(found) == 2 * 2 * 2 * 15 == len({p.key for p in found})
    assert {p.shape[1:] for p in found} == {
        (4096, 4096, 16), (14336, 4096, 16), (4096, 14336, 16)
    }  # fmt: skip
    assert {p.dropout for p in found} == {0.0, 0.1}


def test_two_shapes_of_one_place_are_refused() -> None:
    assert len(tune.points([(128, 64, 64, 8), (129, 64, 64, 8)])) == 16
    with pytest.raises(ValueError, match=r"100,64,64,8 and 128,64,64,8, expected one up to M=128"):
        tune.points([(100, 64, 64, 8), (128, 64, 64, 8)])


@pytest.mark.parametrize("device", [replace(d, gpu=GPU) for d in DEVICES], ids=lambda d: d.name)
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_candidates_are_all_that_may_run_and_the_models_first(op, device) -> None:
    for dropout, quantised in ((0.0, False), (0.1, True)):
        point = replace(POINT, op=op, dropout=dropout, quantised=quantised)
        model = choose(op, point.problem, replace(device, gpu=None))
        # What an earlier table says is no part of the question.
        old = tuned.Entry("epilogue", GEMM_CONFIGS[-1], 1.0)
        with tuned.use_table(tuned.Table(GPU, {point.key: old})):
            found = tune.candidates(point, device)
        assert found[0] == Candidate(model.strategy, model.config)
        assert len(found) == len(set(found))
        assert Candidate("addmm", None) in found
        assert {c.strategy for c in found} == set(STRATEGIES)
        assert any(c.config.tma for c in found if c.config) == device.tma
        for c in found:  # a table is followed in every one
            with tuned.use_table(tuned.Table(GPU, {point.key: c.entry(1.0)})):
                plan = choose(op, point.problem, device)
            assert (plan.strategy, plan.config) == (c.strategy, c.config)


def test_rows_of_odd_bytes_have_no_descriptors() -> None:
    for op, shape, quantised, tma in (
        ("lora_linear_fwd", (8, 7, 64, 4), False, True),
        ("lora_linear_fwd", (8, 64, 7, 4), True, False),
        ("lora_linear_bwd", (8, 64, 7, 4), False, False),
        ("lora_linear_bwd", (8, 64, 7, 4), True, True),
        ("lora_linear_bwd", (8, 7, 64, 4), True, False),
    ):
        assert Point(op, shape, 0.0, quantised).problem.tma == tma


def one(times: Times, alone: Times | None = None) -> tuple[tune.Found, Fake]:
    fake = Fake(times, alone)
    (found,) = tune.tune([POINT], H100, fake)
    return found, fake


MODEL = tune.candidates(POINT, H100)[0]
BEST = Candidate("epilogue", GEMM_CONFIGS[-1])


def timed(model: float | str, best: float | str, others: float | str = 20.0) -> Times:
    return lambda _, c: model if c == MODEL else best if c == BEST else others


def test_the_fastest_replaces_the_models_choice() -> None:
    assert BEST != MODEL
    found, fake = one(timed(10.0, 5.0))
    assert found.entry == tuned.Entry(BEST.strategy, BEST.config, 5.0)
    assert found.chosen == BEST and found.ratio == 0.5
    assert [c for _, c in fake.asked][1:] == [[MODEL, BEST]]


@pytest.mark.parametrize(("best", "taken"), [(9.79, True), (9.81, False), (10.0, False)])
def test_two_per_cent_are_needed(best: float, taken: bool) -> None:
    found, _ = one(timed(10.0, best))
    assert (found.entry is not None) == taken


def test_the_second_comparison_decides() -> None:
    """The fastest of forty may be the luckiest."""
    found, _ = one(timed(10.0, 5.0), timed(10.0, 9.9))
    assert found.entry is None and found.chosen == MODEL
    found, _ = one(timed(10.0, 9.9), timed(10.0, 5.0))
    assert found.entry == tuned.Entry(BEST.strategy, BEST.config, 5.0)


def test_where_the_model_is_best_nothing_is_compared_again() -> None:
    found, fake = one(timed(1.0, 5.0))
    assert found.entry is None and found.ratio == 1.0
    assert len(fake.asked) == 1


@pytest.mark.parametrize("status", [WRONG, FAILED])
def test_what_is_not_right_is_not_taken(status: str) -> None:
    found, _ = one(timed(10.0, status))
    assert found.entry is None
    found, _ = one(timed(status, 5.0))  # even slow is better than wrong
    assert found.entry == tuned.Entry(BEST.strategy, BEST.config, 5.0) and found.ratio is None
    found, _ = one(timed(status, status, status))
    assert found.entry is None
    found, _ = one(timed(10.0, 5.0), timed(10.0, status))  # found later
    assert found.entry is None and found.timings[-1].status == status


def run(path: Path, fake: Fake, shapes: list[str] | None = SHAPE) -> int:
    with use_executor(OnCpu()):
        return tune.run(torch.device("cpu"), shapes, FAST, path, fake)


def addmm_is_fast(point: Point, candidate: Candidate) -> float:
    """In the backward; in the forward the model is right."""
    if point.op == "lora_linear_bwd" and candidate.strategy == "addmm":
        return 1e-6
    return 2e-6


def test_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    fake = Fake(addmm_is_fast)
    assert run(path, fake) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.json"]
    out = capsys.readouterr().out
    assert "lora_linear_bwd M=64 N=64 K=96 r=8 bfloat16 dropout 4-bit" in out
    assert "[8/8]" in out and "taken: 0.500 × the model's" in out
    assert "4 of 8 choices" in out and "gpu.json" in out

    doc = json.loads(path.read_text())
    assert len(doc["entries"]) == 4 and doc["gpu"] == GPU
    keys = ("op", "m", "n", "k", "r", "dtype", "strategy", "config", "seconds")
    assert {tuple(e[k] for k in keys) for e in doc["entries"]} == {
        ("lora_linear_bwd", 64, 64, 96, 8, "bfloat16", "addmm", None, 1e-6)
    }
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(tuned, "_table", None)
    monkeypatch.setattr(tuned, "_was_read", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for point in tune.points([(33, 64, 96, 8)]):  # of the same bucket
            found = choose(point.op, point.problem, OnCpu.device)
            assert (found.measured is not None) == (point.op == "lora_linear_bwd")


def test_only_some_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake(addmm_is_fast)
    with use_executor(OnCpu()):
        place = torch.device("cpu"), SHAPE, FAST, tmp_path / "gpu.json", fake
        assert tune.run(*place, only=r"_bwd .*bfloat16 dropout$") == 0
        assert {str(p) for p, _ in fake.asked} == {
            "lora_linear_bwd M=64 N=64 K=96 r=8 bfloat16 dropout"
        }
        with pytest.raises(ValueError, match="--only: 'zzz' matches none of"):
            tune.run(*place, only="zzz")
    assert "[1/1]" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"

    def times(point: Point, candidate: Candidate) -> float:
        if point.dropout and point.quantised:
            raise KeyboardInterrupt
        return addmm_is_fast(point, candidate)

    with pytest.raises(KeyboardInterrupt):
        run(path, Fake(times))
    assert len(json.loads(path.read_text())["entries"]) == 3


def test_a_wrong_result_makes_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Candidate("epilogue", GEMM_CONFIGS[-1])
    fake = Fake(lambda _, c: WRONG if c == bad else 1e-6)
    assert run(tmp_path / "gpu.json", fake) == 1
    captured = capsys.readouterr()
    assert "epilogue 16x16x32" in captured.err and "wrong: because" in captured.err
    assert "wrong: because" in captured.out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "cuda"], "--device: got 'cuda', but this torch sees no CUDA device"),
        (["--device", "tpu"], "--device: got 'tpu', expected cpu or cuda"),
        (["--shapes", "1,2,3,4"], "--shapes: given with --device cpu, expected --device cuda"),
        (["--only", "fwd"], "--only: given with --device cpu, expected --device cuda"),
        (["--seconds", "0"], "seconds: got 0.0"),
    ],
)
def test_bad_arguments(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_shape_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got '1,2', expected M,N,K,r"):
        run(tmp_path / "gpu.json", Fake(addmm_is_fast), ["1,2"])
    with pytest.raises(ValueError, match="--device: got 'cpu', expected a GPU"):
        tune.run(torch.device("cpu"), SHAPE, FAST, tmp_path / "gpu.json")
    assert list(tmp_path.iterdir()) == []


# --- the measurer ---------------------------------------------------------------------------------

TINY = (33, 64, 96, 8)


def as_triton(monkeypatch: pytest.MonkeyPatch, op: str, fn: Callable[..., Any]) -> None:
    new = Implementation("triton", fn)
    monkeypatch.setitem(ops()[op].implementations, "triton", new)


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
@pytest.mark.parametrize(("dropout", "quantised"), [(0.0, False), (0.1, True)])
def test_every_candidate_is_run_checked_and_timed(
    op: str, dropout: float, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(op, TINY, dropout, quantised)
    reference, ran = ops()[op].implementations["reference"].fn, []

    def triton(call: Any) -> Any:
        plan = choose(op, point.problem, planned_device(torch.device("cpu")))
        way = Candidate(plan.strategy, plan.config)
        ran.append(way)
        outputs = list(reference(call))
        if way.config == GEMM_CONFIGS[-1] and way.strategy == "epilogue":
            outputs[1] = outputs[1] + 1  # s, or dA
        if way.strategy == "addmm":
            raise RuntimeError("out of resources\nand more")
        return tuple(outputs)

    as_triton(monkeypatch, op, triton)
    with use_executor(OnCpu()):
        ways = tune.candidates(point, OnCpu.device)
        measurer = Measurer(torch.device("cpu"), FAST)
        timings = measurer(point, ways)
    assert [t.candidate for t in timings] == ways and len(ways) == 5
    for t in timings:
        if t.candidate.strategy == "addmm":
            assert (t.status, t.note) == (FAILED, "RuntimeError: out of resources")
        elif t.candidate == Candidate("epilogue", GEMM_CONFIGS[-1]):
            assert t.status == WRONG and t.note.startswith("s: " if op.endswith("fwd") else "da: ")
        else:
            assert t.status == OK and len(t.samples) == FAST.min_rounds
            # checked, tried three times, timed, checked again
            assert ran.count(t.candidate) == 1 + 3 + FAST.min_rounds + 1
            continue
        assert t.samples == [] and ran.count(t.candidate) == 1


def test_a_result_that_goes_wrong_later_takes_its_times_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = Point("lora_linear_fwd", TINY)
    reference, calls = ops()[point.op].implementations["reference"].fn, []

    def triton(call: Any) -> Any:
        calls.append(1)
        y, s = reference(call)
        return y + (len(calls) > 7), s

    as_triton(monkeypatch, point.op, triton)
    with use_executor(OnCpu()):
        (timing,) = Measurer(torch.device("cpu"), FAST)(point, [Candidate("addmm", None)])
    assert len(calls) == 8 and timing.status == WRONG and timing.samples == []


def test_another_way_than_the_one_asked_for_is_not_timed() -> None:
    absent = Candidate("epilogue", GEMM_CONFIGS[0])
    with use_executor(OnCpu()):
        (timing,) = Measurer(torch.device("cpu"), FAST)(Point("lora_linear_fwd", TINY), [absent])
    assert timing.status == FAILED and "would run instead" in timing.note


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 is not set")
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd"])
def test_the_kernels_themselves_pass(op: str) -> None:
    point = Point(op, TINY, 0.1, quantised=True)
    with use_executor(OnCpu()), use_backend(None):
        ways = tune.candidates(point, OnCpu.device)
        timings = Measurer(torch.device("cpu"), replace(FAST, min_rounds=1))(point, ways)
    assert [(t.candidate, t.status, t.note) for t in timings] == [(w, OK, "") for w in ways]
