"""Training that leaves the finite numbers stops, says so, and leaves only adapters that load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from lora_kernels.adapters import load_adapter
from lora_kernels.cli import main
from lora_kernels.cli.errors import Failed

from .conftest import make_model

SHORT = ("--batch-size", 4, "--max-length", 64, "--rank", 4, "--quantize", "none")


class Poison(TrainerCallback):
    """Change a trained weight, or its gradient, at a step."""

    def __init__(self, step: int, value: float, gradient: bool = False) -> None:
        self.step, self.value, self.gradient = step, value, gradient
        self.hook: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.gradient:
            weight = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            self.hook = weight.register_hook(lambda grad: grad * self.value)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.gradient:
            weight = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            with torch.no_grad():
                weight[0, 0] = self.value


def assert_good(out: Path, steps: list[int]) -> None:
    """No adapter is announced; the checkpoints left are those, and each one loads."""
    assert not (out / "adapter").exists() and not (out / "summary.json").exists()
    assert not list(out.glob(".saving-*"))
    assert sorted(out.glob("checkpoint-*")) == [out / f"checkpoint-{n}" for n in steps]
    for step in steps:
        load_adapter(make_model(), out / f"checkpoint-{step}")


@pytest.mark.parametrize("every", [1, 100])
def test_a_learning_rate_that_explodes(tiny, pairs, tmp_path, capsys, every):
    out = tmp_path / "out"
    options = ["--model", tiny, "--data", pairs, *SHORT, "--dtype", "float32", "--lr", "1e30"]
    options += ["--save-steps", every, "--keep", 1, "--output", out, "--warmup", 2, "--generate", 0]
    assert main(["finetune", *map(str, options)]) == 1
    captured = capsys.readouterr()
    assert "adapter:" not in captured.out
    line = captured.err.strip().splitlines()[-1]
    assert "is nan" in line or "is inf" in line or "is not finite" in line
    assert "--lr" in line and "--max-grad-norm" in line and "--dtype float32" in line
    # The first step has a learning rate of 0; what the second leaves gives no finite output.
    good = out / "checkpoint-1"
    assert (f"{good}." if every == 1 else "No good checkpoint") in line
    assert_good(out, [1] if every == 1 else [])


def test_a_weight_between_two_checkpoints(finetune, pairs, tmp_path):
    with pytest.raises(Failed, match=r"loss of step 4 is nan.*checkpoint-2\."):
        finetune(
            *("--data", pairs, *SHORT, "--max-steps", 8, "--save-steps", 2),
            callbacks=[Poison(3, float("nan"))],
        )
    assert_good(tmp_path / "out", [2])


def test_a_weight_at_the_very_end_is_not_saved(finetune, pairs, tmp_path):
    """The last update overflows, which no later loss can tell; nothing is held out."""
    with pytest.raises(Failed, match=r"lora_A.* after step 4\..*checkpoint-2\."):
        finetune(
            *("--data", pairs, *SHORT, "--max-steps", 4, "--save-steps", 2, "--eval-fraction", 0),
            callbacks=[Poison(4, float("inf"))],
        )
    assert_good(tmp_path / "out", [2])


def test_finite_weights_that_give_no_finite_output(finetune, pairs, tmp_path):
    with pytest.raises(Failed, match="output after step 3 is not finite"):
        finetune(
            *("--data", pairs, *SHORT, "--max-steps", 3, "--save-steps", 2, "--eval-fraction", 0),
            callbacks=[Poison(3, 3e38)],
        )
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), 1e38])  # 1e38: only the norm overflows
@pytest.mark.parametrize("clip", [0, 1])
def test_a_gradient(finetune, pairs, tmp_path, value, clip):
    options = ("--max-steps", 6, "--save-steps", 2, "--max-grad-norm", clip, "--grad-accum", 2)
    with pytest.raises(Failed, match=r"gradient norm of step 4 is (nan|inf).*checkpoint-2\."):
        finetune("--data", pairs, *SHORT, *options, callbacks=[Poison(3, value, gradient=True)])
    assert_good(tmp_path / "out", [2])


def test_a_base_that_is_not_finite(finetune, tiny, pairs, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    options = ("--data", pairs, *SHORT, "--dtype", "float32", "--model", model)
    with pytest.raises(Failed, match="before any training: the weights"):
        finetune(*options)
    with pytest.raises(Failed, match="loss of step 1 is nan"):
        finetune(*options, "--eval-fraction", 0, "--generate", 0, "--overwrite")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["held_out_before"] is None


def test_the_serving_demo_stops_too():
    from lora_kernels.cli.serve_demo.adapters import one_adapter, train_voice
    from lora_kernels.cli.serve_demo.voices import VOICES

    from .conftest import make_tokenizer

    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    single = one_adapter(model, 2)
    with pytest.raises(Failed, match=r"gave a loss of nan.*--dtype float32"):
        train_voice(single, make_tokenizer(), next(iter(VOICES)), 1, None, lambda note: None)
