"""Parameter groups, and the pieces around the loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from lora_kernels.adapters import apply_lora
from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune import meter, models, plot
from lora_kernels.cli.finetune.rundir import CHECKPOINT_FILES, RunDir
from lora_kernels.cli.finetune.source import Source
from lora_kernels.cli.finetune.trainer import mean_token_loss, parameter_groups

from .conftest import make_model


def test_loraplus_groups_hold_every_trainable_parameter_once():
    model = make_model()
    apply_lora(model, r=2)
    a, b = parameter_groups(model, 1e-3, 16, 0.01)
    assert (a["lr"], b["lr"]) == (1e-3, 16e-3)
    assert a["weight_decay"] == b["weight_decay"] == 0.01
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)].rpartition(".")[2] for p in a["params"]} == {"lora_A"}
    assert {names[id(p)].rpartition(".")[2] for p in b["params"]} == {"lora_B"}
    assert sorted(map(id, a["params"] + b["params"])) == sorted(names)


def test_mean_token_loss_counts_tokens_not_batches():
    losses = torch.tensor([[1.0, 2.0, 3.0], [6.0, -100.0, -100.0]])
    assert mean_token_loss(SimpleNamespace(predictions=losses)) == {"token_loss": 3.0}


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (folder / name).touch()
    return folder


def test_checkpoints_are_ordered_by_step(tmp_path):
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    (tmp_path / ".saving-abc" / "checkpoint-200").mkdir(parents=True)
    (tmp_path / "checkpoint-x").mkdir()
    run = RunDir(tmp_path)
    assert [p.name for p in run.checkpoints()] == [f"checkpoint-{n}" for n in (3, 20, 100)]
    assert run.checkpoint("last").name == "checkpoint-100"
    assert run.checkpoint("checkpoint-20").name == "checkpoint-20"
    assert run.checkpoint(str(tmp_path / "checkpoint-3")).name == "checkpoint-3"
    with pytest.raises(UsageError, match="no checkpoint"):
        run.checkpoint("checkpoint-4")
    with pytest.raises(UsageError, match="no checkpoint"):
        RunDir(tmp_path / "none").checkpoint("last")


def test_overwrite_touches_only_the_run(tmp_path):
    run = RunDir(tmp_path)
    checkpoint(tmp_path, 1)
    run.write_json(run.run, {})
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds a run"):
        run.prepare(overwrite=False)
    run.prepare(overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_log_is_cut_at_the_checkpoint_and_survives_half_a_line(tmp_path):
    run = RunDir(tmp_path)
    rows = [{"step": 0, "held_out_loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    run.log.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "lo')
    assert run.read_log() == rows
    run.cut_log(1)
    assert run.read_log() == rows[:2]
    assert run.log.read_text().endswith("\n")


def test_broken_run_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="not readable"):
        RunDir(tmp_path).read_run()


def test_plot_writes_a_picture_and_no_leftover(tmp_path):
    records = [{"step": i, "loss": 1 / (i + 1), "lr": 1e-3} for i in range(1, 5)]
    plot.loss_curves([{"step": 0, "held_out_loss": 1.0}, *records], tmp_path / "l.png", "title")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_smoothing_starts_at_the_first_value():
    values = plot.smooth([4.0, 4.0, 4.0])
    assert all(math.isclose(v, 4.0) for v in values)


def test_memory_is_measured():
    meter.reset_peak()
    before = meter.resident_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert meter.resident_bytes() - before > 32 << 20
    del block
    assert meter.peak_bytes() - before > 32 << 20


def test_dtype_names():
    assert models.pick_dtype("float32") is torch.float32
    assert models.pick_dtype("bfloat16") is torch.bfloat16
    expected = torch.bfloat16 if models.cpu_multiplies_bf16() else torch.float32
    if not torch.cuda.is_available():
        assert models.pick_dtype("auto") is expected


def test_auto_is_fp32_without_bf16_hardware(monkeypatch):
    monkeypatch.setattr(models, "cpu_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.pick_dtype("auto") is torch.float32


def test_model_names():
    assert Source.of("org/name") == Source("org/name")
    for missing in ("./nowhere", "/nowhere", "a/b/c", "nowhere.gguf"):
        with pytest.raises(UsageError, match=r"--model: no (folder|file)"):
            Source.of(missing)
