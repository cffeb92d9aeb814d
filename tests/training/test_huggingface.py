"""Trainers of transformers that save adapters: checkpoints, resuming, the best model."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lora_kernels import training
from lora_kernels.adapters import apply_lora, load_adapter
from lora_kernels.testing import assert_within_budget
from tests.adapters import heads
from tests.adapters.models import llama, logits, tokens

CHECKPOINT = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"}
DATA = [{"input_ids": row, "labels": row} for row in tokens().repeat(3, 1)]


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **dict(
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        | options,
    )


def adapted(folder: Path | None = None, **options):
    model = llama() if folder is None else AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    apply_lora(model, r=4, dropout=0.1, **{"target_modules": ["q_proj"]} | options)
    return model


class Wide(Trainer):
    """As trl's: a Trainer of another name, with a `_save_checkpoint` of its own."""

    def _save_checkpoint(self, model, trial):
        self.saved = True
        super()._save_checkpoint(model, trial)


class WideAdapters(training.AdapterCheckpoints, Wide):
    pass


KINDS = {"trainer": training.AdapterTrainer, "another trainer": WideAdapters}
OPTIONS = {
    "plain": {},
    "nf4": {"quantize": "nf4"},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [int(tokens()[0, 0])]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_checkpoints_hold_the_adapters_and_resume(kind, case, tmp_path):
    model = adapted(**OPTIONS[case])
    KINDS[kind](model=model, args=arguments(tmp_path), train_dataset=DATA).train()
    for step in (2, 4):
        files = {p.name for p in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files >= CHECKPOINT and not any(f.startswith(("model", "pytorch")) for f in files)
    expected = logits(model.eval())
    other = llama()
    load_adapter(other, tmp_path / "checkpoint-4", quantize=OPTIONS[case].get("quantize"))
    assert torch.equal(logits(other), expected)
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = adapted(**OPTIONS[case])
    trainer = KINDS[kind](model=again, args=arguments(tmp_path), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert torch.equal(logits(again.eval()), expected)


@pytest.mark.filterwarnings("ignore")
def test_from_pretrained_of_a_checkpoint_is_not_the_base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    trainer = training.AdapterTrainer(
        model=model, args=arguments(tmp_path / "run"), train_dataset=DATA
    )
    trainer.train()
    trainer.save_model(tmp_path / "last")
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "last"):
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        exact = logits(copy.deepcopy(loaded).double())
        assert_within_budget(logits(model.eval()), exact, logits(loaded))
        assert not torch.equal(logits(loaded), logits(llama()))


def test_the_best_model_comes_back(tmp_path):
    model = adapted()
    best = {}

    class Trainer(training.AdapterTrainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            best[self.state.global_step] = copy.deepcopy(model)

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    options |= {"learning_rate": 3.0}  # so that the first is the best
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
    )
    trainer.train()
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert torch.equal(logits(model.eval()), logits(best[step].eval()))


def test_a_new_head_is_in_the_checkpoints(tmp_path):
    model = heads.make("bert sequence")
    apply_lora(model, r=2)
    rows = heads.inputs(model)["input_ids"]
    data = [{"input_ids": row, "labels": i % 5} for i, row in enumerate(rows)]
    training.AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=data).train()
    other = heads.make("bert sequence")
    load_adapter(other, tmp_path / "checkpoint-4")
    assert torch.equal(heads.predictions(other), heads.predictions(model.eval()))
    assert not torch.equal(other.classifier.weight, heads.make("bert sequence").classifier.weight)


@pytest.mark.filterwarnings("ignore")
def test_the_callback_for_any_trainer(tmp_path):
    model = adapted()
    Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=DATA,
        callbacks=[training.AdapterCallback()],
    ).train()
    other = llama()
    load_adapter(other, tmp_path / "checkpoint-4")
    assert torch.equal(logits(other), logits(model.eval()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert_within_budget(
        logits(model), logits(copy.deepcopy(loaded).double()), logits(loaded), "from_pretrained"
    )
    again = adapted()
    Trainer(model=again, args=arguments(tmp_path), train_dataset=DATA).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert torch.equal(logits(again.eval()), logits(model))


def test_a_plain_trainers_checkpoint_is_gone_on_from(tmp_path):
    model = adapted()
    Trainer(model=model, args=arguments(tmp_path), train_dataset=DATA).train()
    again = adapted()
    trainer = training.AdapterTrainer(model=again, args=arguments(tmp_path), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_models_without_adapters_are_refused(tmp_path):
    for model, match in (
        (llama(), "has no adapters; call apply_lora first"),
        (get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])), "has PEFT's adapters"),
    ):
        with pytest.raises(ValueError, match=match):
            training.AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = training.Nothing


def test_a_parameter_without_a_place_stops_before_the_first_step(tmp_path):
    model = adapted()
    model.model.norm.requires_grad_(True)
    trainer = training.AdapterTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(ValueError, match=r"model\.norm\.weight trains"):
        trainer.train()
    assert trainer.state.global_step == 0
