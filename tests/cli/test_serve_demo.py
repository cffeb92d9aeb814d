"""`lora-kernels serve-demo` from end to end on a tiny random model, and what it refuses."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from matplotlib.figure import Figure
from rich.console import Console

from lora_kernels.cli import main
from lora_kernels.cli.serve_demo import adapters, job, measure, memory, plot
from lora_kernels.cli.serve_demo.progress import stage
from lora_kernels.serving import AdapterPool

# (in, out) of each layer of the tiny model but its head, whose one layer is 64 wide.
SHAPES = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
BATCH = 5
Command = Callable[..., int]


@pytest.fixture
def serve(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on the tiny model; temporary files go to tmp_path/temporary, and must leave it.

    Stands in for the machine's free memory, so that no test depends on it.
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)

    def call(*options: Any) -> int:
        argv = ["--model", tiny, "--dtype", "float32", "--adapters", 6, "--rank", 3]
        argv += ["--batch", BATCH, "--tokens", 4, "--train-steps", 2, "--rounds", 1]
        argv += ["--plot", tmp_path / "plot.png", *options]
        status = main(["serve-demo", *map(str, argv)])
        assert not list(temporary.iterdir())
        return status

    return call


def rows(text: str) -> dict[str, list[str]]:
    """The printed lines of two columns and more, by the first."""
    found = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {first: rest for first, *rest in found if rest}


@pytest.mark.slow
def test_run(serve, tmp_path, capsys):
    assert serve() == 0
    captured = capsys.readouterr()
    found = rows(captured.out)

    width = sum(k + n for k, n in SHAPES)
    pages, tables = 6 * 16 * width * 4, 6 * len(SHAPES) * 12
    assert found["A and B, computed"] == [
        memory.size(6 * 3 * width * 4),
        f"6 x 3 ranks x {width} x 4 bytes",
    ]
    assert found["pages, computed"][0] == memory.size(pages)
    assert found["tables, computed"] == [memory.size(tables), "7 layers"]
    assert found["the pool's account"] == [memory.size(pages + tables), "in use, as computed"]

    assert {"base", "pirate", "cook", "robot", "gardener", "pirate-4"} <= set(found)
    assert found["logits within the error budget"] == [str(BATCH), f"of {BATCH} rows"]
    chosen, of = found["tokens it would choose too"]
    assert of.removeprefix("of ") == chosen  # fp32: nothing is so near a tie

    for distinct in ("1", "2", "4", "5"):
        ours, share, theirs = found[distinct]
        assert float(ours) > 0 and float(share.rstrip("%")) > 0 and float(theirs) > 0
    assert float(found["base alone"][0]) > 0
    assert "PEFT took" in captured.out and f"to load {BATCH} adapters" in captured.out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "temporary"]
    for line in ("fine-tuning 8/8", "loading 6/6", "checking 5/5"):
        assert line in captured.err


@pytest.mark.slow
def test_a_wrong_row_is_found_and_peft_can_be_left_out(serve, monkeypatch, capsys):
    load = AdapterPool.load

    def other(pool: Any, name: str, source: Any, config: Any = None) -> int:
        if name == "pirate-4":
            source = {key: 1.5 * t if "lora_B" in key else t for key, t in source.items()}
        return load(pool, name, source, config)

    monkeypatch.setattr(AdapterPool, "load", other)
    assert serve("--peft-seconds", 0) == 1
    out = capsys.readouterr().out
    found = rows(out)
    assert found["logits within the error budget"] == ["4", "of 5 rows"]
    assert "pirate-4: largest error" in out
    assert all(found[distinct][2] == "-" for distinct in "1245")
    assert "PEFT left out: --peft-seconds 0" in out


@pytest.mark.slow
def test_peft_is_measured_with_what_it_could_load(serve, monkeypatch, capsys):
    load = job.load_peft

    def no_time(*given: Any) -> Any:
        *others, _seconds, tick = given
        return load(*others, 0.0, tick)

    monkeypatch.setattr(job, "load_peft", no_time)
    assert serve() == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert float(found["1"][2]) > 0 and all(found[distinct][2] == "-" for distinct in "245")
    assert "to load 1 adapters of 5, then its --peft-seconds were over" in out


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(serve, tmp_path, monkeypatch, capsys):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "measure", interrupted)
    assert serve("--peft-seconds", 0) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 7), "--batch: got 7, expected at most --adapters 6"),
        (("--question", "  "), "--question: got nothing, expected a text"),
        (("--plot", "plot.jpeg"), "--plot: got 'plot.jpeg', expected a name that ends in .png"),
        (("--plot", "no/such/plot.png"), "--plot: no folder 'no/such'"),
        (("--model", "/no/such/model"), "--model: no folder '/no/such/model'"),
        (("--tokens", 250), r"--tokens: got 250 after a prompt of \d+, expected at most 256"),
        (("--adapters", 10**6), r"--adapters: 1000000 of rank 3 take 55\.\d+ GiB of pages, and 1"),
    ],
)
def test_refuses(serve, capsys, options, message):
    assert serve(*options) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--adapters", "--rank", "--batch", "--tokens", "--rounds"])
def test_refuses_zero(serve, capsys, option):
    with pytest.raises(SystemExit) as stop:
        serve(option, 0)
    assert stop.value.code == 2
    assert f"{option}: got 0, expected a whole number of at least 1" in capsys.readouterr().err


def test_refuses_a_folder_as_plot(serve, tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    assert serve("--plot", tmp_path / "a.png") == 2
    assert "is a folder" in capsys.readouterr().err


def test_derived_adapters_are_all_different_and_always_the_same():
    parents = tuple({"a": torch.full((2, 3), v), "b": torch.full((4,), -v)} for v in (1.0, 2.0))
    folders = {"x": Path("x"), "y": Path("y")}
    made = adapters.Adapters(9, 5, folders, parents, {})
    assert [made.name(i) for i in range(4)] == ["x", "y", "x-2", "y-3"]
    assert made.state(1) is parents[1]
    states = [torch.cat([t.flatten() for t in made.state(i).values()]) for i in range(9)]
    assert len({tuple(s.tolist()) for s in states}) == 9
    again = adapters.Adapters(9, 5, folders, parents, {}).state(7)
    assert all(torch.equal(t, again[key]) for key, t in made.state(7).items())
    other = adapters.Adapters(9, 6, folders, parents, {}).state(7)
    assert not any(torch.equal(t, other[key]) for key, t in made.state(7).items())


def test_figures_are_medians_in_rotating_order(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def case(who: str, seconds: list[float]) -> measure.Case:
        def call() -> torch.Tensor:
            calls.append(who)
            now[0] += seconds.pop(0)
            return torch.zeros(2, 3, dtype=torch.int64)

        return measure.Case(who, 1, call)

    # The first of each warms up.
    cases = [case("a", [99, 2, 3, 50]), case("b", [99, 1, 1, 1])]
    assert measure.measure(cases, 3, lambda note: None) == {("a", 1): 6 / 3, ("b", 1): 6.0}
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_a_stage_is_a_bar_on_a_terminal_and_lines_elsewhere():
    shown = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with stage(console, "loading", 10) as tick:
            for i in range(10):
                tick(f"note {i}")
        shown.append(console.file.getvalue())
    assert "loading" in shown[0] and "10/10" in shown[0] and "\x1b[" in shown[0]
    assert shown[1].splitlines() == [f"loading {i + 1}/10  note {i}" for i in (2, 4, 7, 9)]


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])]
)
def test_counts(batch, expected):
    assert measure.counts(batch) == expected


RATES = {("base", 0): 90.0, ("pool", 1): 80.0, ("pool", 2): 70.0, ("PEFT", 1): 60.0}


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.pdf", b"%PDF")])
def test_plot_replaces_the_file(tmp_path, name, start):
    path = tmp_path / name
    path.write_text("old")
    plot.draw(RATES, 2, path, "title")
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    path.write_text("old")

    def half(figure: Figure, to: Path, **_: Any) -> None:
        Path(to).write_text("half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space"):
        plot.draw(RATES, 2, path, "title")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
