"""Whatever goes wrong, a user of the commands reads one line, and the status is not 0."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from matplotlib.figure import Figure

from lora_kernels.cli import main
from lora_kernels.cli.finetune import job
from lora_kernels.cli.finetune.rundir import RunDir
from lora_kernels.cli.finetune.source import Source

from .conftest import make_model, make_tokenizer

SHORT = ("--dtype", "float32", "--max-length", 64, "--batch-size", 4, "--generate", 0)
# Rich would drop the tag and draw the name, matplotlib would set the rest as a formula.
ODD = r"[bold]a[/bold] $x_{ :smile: 5$ \frac [/]"

Failing = Callable[..., str]


@pytest.fixture
def failing(tiny: Path, pairs: Path, tmp_path: Path, capfd: Any) -> Failing:
    """The line that `finetune` fails with, on the tiny model unless told otherwise."""

    def call(*options: Any, status: int = 2) -> str:
        argv = ["--model", tiny, "--data", pairs, "--output", tmp_path / "out", *SHORT, *options]
        if "--resume" in options:
            argv = ["--output", tmp_path / "out", *options]
        capfd.readouterr()
        assert main(["finetune", *map(str, argv)]) == status
        err = capfd.readouterr().err
        assert "Traceback" not in err
        line = err.strip().splitlines()[-1]
        assert line.startswith("lora-kernels finetune: error: ")
        return line

    return call


def test_a_run_in_an_odd_place(tiny, pairs, tmp_path, capsys):
    home = tmp_path / ODD.replace("/", "")
    home.mkdir()
    shutil.copytree(tiny, home / "model")
    data = shutil.copy(pairs, home / "data.jsonl")
    argv = ["--model", home / "model", "--data", data, "--output", home / "out", "--max-steps", 1]
    argv += ["--merge", "--verify", *SHORT, "--generate", 1]
    assert main(["finetune", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert f"adapter: {home / 'out' / 'adapter'}\n" in captured.out
    assert f"model: {home / 'model'}," in captured.err
    assert (home / "out" / "merged" / "model.safetensors").is_file()
    assert not list((home / "out").glob(".*"))
    assert main(["finetune", "--output", str(home / "out"), "--resume"]) == 0
    assert f"continuing from {home / 'out' / 'checkpoint-1'}\n" in capsys.readouterr().err


def test_odd_words_in_the_serving_demo(tmp_path, capsys):
    from lora_kernels.cli.finetune.progress import plain_console
    from lora_kernels.cli.serve_demo import plot, report

    rates = {("base", 0): 90.0, ("pool", 1): 80.0}
    plot.draw(rates, 1, tmp_path / "p.png", f"{ODD}, rank 3")
    report._rows(plain_console(), ODD, [(ODD, "", "")])
    assert capsys.readouterr().out.split("\n") == ["", ODD, f"  {ODD}", ""]


@pytest.mark.parametrize(
    "place", ["/dev/null/x", "/proc/nowhere/x", "{tmp}/" + "x" * 300, "{tmp}/f"]
)
def test_an_output_that_cannot_be_made(failing, monkeypatch, tmp_path, place):
    (tmp_path / "f").touch()
    monkeypatch.setattr(job, "load_tokenizer", None)  # never asked
    monkeypatch.setattr(job, "load_model", None)
    assert "--output: " in failing("--output", place.format(tmp=tmp_path))


def test_asking_for_the_place_leaves_nothing(tmp_path):
    RunDir(tmp_path / "a" / "b").check(overwrite=False)
    (tmp_path / "c").mkdir()
    RunDir(tmp_path / "c").check(overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("place", ["/proc/p.png", "/dev/null/p.png"])
def test_a_plot_that_cannot_be_made(place, tiny, capsys):
    assert main(["serve-demo", "--model", str(tiny), "--plot", place]) == 2
    assert "error: --plot: " in capsys.readouterr().err


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond a size: the system then refuses to write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [300, 4096, 14000, 30000])
def test_a_full_disk(failing, small_files, tmp_path, size, monkeypatch):
    """Whatever file is the first that does not fit, by whatever library it is written."""
    out = tmp_path / "out"
    small_files(size)
    line = failing("--max-steps", 2, "--save-steps", 1, status=1)
    assert "disk is full" in line or "cannot write" in line
    assert not list(out.glob(".*")) and not (out / "adapter").exists()


def test_a_disk_that_fills_up_later_can_go_on(failing, monkeypatch, tmp_path):
    def full(figure: Figure, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "loss.png")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        line = failing("--max-steps", 1, status=1)
    assert "disk is full" in line and f"--output {tmp_path / 'out'} --resume" in line
    assert main(["finetune", "--output", str(tmp_path / "out"), "--resume"]) == 0


def test_an_unexpected_error_says_where_to_look(failing, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("what nobody thought of")

    monkeypatch.setattr("lora_kernels.cli.finetune.job.load_model", broken)
    line = failing(status=1)
    assert "KeyError: 'what nobody thought of'" in line and "LORA_KERNELS_TRACEBACK=1" in line
    monkeypatch.setenv("LORA_KERNELS_TRACEBACK", "1")
    with pytest.raises(KeyError):
        failing(status=1)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.6])
def test_a_truncated_file_of_the_model(failing, tiny, tmp_path, name, share):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    whole = (model / name).read_bytes()
    (model / name).write_bytes(whole[: int(share * len(whole))])
    line = failing("--model", model)
    assert "--model: cannot " in line and str(model) in line


def test_a_broken_gguf(failing, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00")
    assert "--model: cannot " in failing("--model", tmp_path / "x.gguf")


def test_a_directory_as_data(failing, tmp_path):
    line = failing("--data", tmp_path)
    assert f"--data: {str(tmp_path)!r} is a folder, expected" in line


def test_a_table_as_data(failing, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\na,b\n")
    assert "is a table; write its rows as .jsonl" in failing("--data", tmp_path / "a.csv")


def test_a_file_as_model(failing, pairs):
    assert "is a file, expected a folder" in failing("--model", pairs)


@pytest.mark.parametrize(
    "name", ["smollm-typo", "org/smollm-typo", "not a name!", "a--b/..", "a:b"]
)
def test_a_mistyped_model_is_refused_at_once(failing, name, monkeypatch):
    """Offline by the setting, and where the hub does not answer, after one question."""
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def unreachable(self: Any, name: str, **options: Any) -> None:
        asked.append((name, options["timeout"] > 0))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    valid = name.endswith("typo")
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        line = failing("--model", name)
        assert f"--model: no folder {name!r}, and " in line
        if valid:
            assert ("HF_HUB_OFFLINE" if offline else "no route") in line
    assert asked == ([(name, True)] if valid else [])


def test_the_hub_is_asked_once_and_its_cache_serves_without_it(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    def answer(error: Exception | None) -> Callable[..., None]:
        def model_info(*_: Any, **__: Any) -> None:
            if error is not None:
                raise error

        return model_info

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(None))
    assert Source("org/name").located() == Source("org/name")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer(TimeoutError()))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    found = Source("org/name").located()
    assert found.cached and found.options()["local_files_only"] is True


def test_a_padding_token_beyond_the_embedding(tiny, pairs, tmp_path, finetune):
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|late|>"})
    assert tokenizer.pad_token_id == 259
    tokenizer.save_pretrained(model)
    args = ("--data", pairs, *SHORT, "--max-steps", 1, "--generate", 2, "--model", model)
    assert finetune(*args) == 0


def test_tokens_beyond_the_embedding(failing, tmp_path):
    model = tmp_path / "model"
    make_model(vocab=258).save_pretrained(model)  # <|end|> is 258
    make_tokenizer().save_pretrained(model)
    line = failing("--model", model)
    assert "gives '<|end|>' the number 258" in line and "below 258 alone" in line


def test_a_padding_token_that_the_configuration_gives(failing, tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 259}))
    line = failing("--model", model)
    assert "gives pad_token_id 259, expected a token below its vocab_size 259" in line


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
             "adapter_model.safetensors", "adapter_config.json"],
)  # fmt: skip
def test_a_damaged_checkpoint(failing, finetune, pairs, tmp_path, name):
    finetune("--data", pairs, *SHORT, "--max-steps", 4, "--save-steps", 2)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-2" / name).write_bytes(b"")
    line = failing("--resume")
    assert "checkpoint-2' is damaged" in line


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": {}}', "\xff"])
def test_a_damaged_run_file(failing, finetune, pairs, tmp_path, text):
    finetune("--data", pairs, *SHORT, "--max-steps", 1)
    path = tmp_path / "out" / "run.json"
    if text.startswith('{"s'):
        text = json.dumps({"settings": json.loads(path.read_text())["settings"], "other": 1})
    path.write_bytes(text.encode("latin-1"))
    assert "run.json: not " in failing("--resume")


def test_a_reader_that_goes_away_and_a_terminal_of_few_letters():
    code = (
        "import os, sys, types; import lora_kernels.cli as cli\n"
        "def run(args, parser, argv):\n"
        "    print('\\u2192 \\udc80', flush=True); os.read(0, 1); print('x' * 99999, flush=True)\n"
        "sys.modules['fake'] = types.SimpleNamespace(run=run, add_arguments=lambda parser: None)\n"
        "cli.COMMANDS['fake'] = ('fake', '')\n"
        "sys.exit(cli.main(['fake']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert process.stdout.readline() == b"\\u2192 \\udc80\n"
    process.stdout.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 1
