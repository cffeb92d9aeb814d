"""Adapters of a joint run: in PEFT, in a pool, and trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lora_kernels import LoRAConfig, load_adapter
from lora_kernels.serving import AdapterPool, attach_pool
from lora_kernels.testing import assert_within_budget
from lora_kernels.training import AdapterJob, MultiLoRATrainer
from tests.adapters.models import llama, tokens
from tests.training.jobs import batches, jobs, weights


def test_saved_adapters_load_into_peft_a_pool_and_a_model(tmp_path):
    trainer = MultiLoRATrainer(llama(), jobs(dropout=True))
    trainer.train(2)
    assert trainer.save(tmp_path) == {name: tmp_path / name for name in trainer.runs}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(trainer.runs)
    with torch.no_grad():
        assert_saved(trainer, tmp_path)


def assert_saved(trainer: MultiLoRATrainer, folder: Path) -> None:
    base = llama()
    pool = AdapterPool(llama(), slots=8, pages=14)
    served = llama()
    attach_pool(served, pool)
    for name, run in trainer.runs.items():
        own = load_adapter(model := llama(), folder / name)
        assert sorted(own.modules) == sorted(n for n, _ in run.layers)
        peft = PeftModel.from_pretrained(llama(), folder / name).eval()
        config = peft.peft_config["default"]
        assert (config.r, config.lora_alpha) == (run.job.config.r, run.job.config.alpha)
        plain = peft(tokens()).logits
        exact = peft.double()(tokens()).logits
        assert not torch.equal(plain, base(tokens()).logits)
        assert_within_budget(model(tokens()).logits, exact, plain, f"{name} loaded")
        pool.load(name, folder / name)
        with pool.route([name] * 2):
            assert_within_budget(served(tokens()).logits, exact, plain, f"{name} served")


def two(count: int = 4) -> dict[str, AdapterJob]:
    def job(seed: int, **options) -> AdapterJob:
        config = LoRAConfig(r=4 * seed, dropout=0.1)
        return AdapterJob(config, batches(seed, count=count), lr=1e-2, seed=seed, **options)

    return {"a": job(1, steps=3), "b": job(2, schedule="cosine", warmup=1, steps=6)}


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    whole = MultiLoRATrainer(llama(), two(), quantize="nf4")
    whole.train()
    first = MultiLoRATrainer(llama(), two(), quantize="nf4")
    for steps in (2, 2):  # the second time "a" is finished
        first.train(steps)
        first.save(tmp_path)
        second = MultiLoRATrainer(llama(), two(), quantize="nf4")
        second.resume(tmp_path)
        assert second.losses == first.losses
        assert second.train() == whole.losses
        for run, other in zip(second.runs.values(), whole.runs.values(), strict=True):
            expected = weights(other.layers)
            assert all(torch.equal(t, expected[k]) for k, t in weights(run.layers).items())


def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    trainer = MultiLoRATrainer(llama(), two())
    trainer.train(1)
    trainer.save(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    trainer.train(1)

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        trainer.save(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_resume_refuses_what_does_not_fit(tmp_path):
    trainer = MultiLoRATrainer(llama(), two())
    trainer.train(4)
    trainer.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"c/adapter_model.safetensors: no such file"):
        MultiLoRATrainer(llama(), {"c": two()["a"]}).resume(tmp_path)
    for config, message in (
        (LoRAConfig(r=5), r"q_proj.lora_A.weight: got shape \[4, 64\], expected \[5, 64\]"),
        (LoRAConfig(r=4, target_modules=("q_proj",)), "expected the layers of 'a'"),
    ):
        other = MultiLoRATrainer(llama(), {"a": AdapterJob(config, batches(1))})
        with pytest.raises(ValueError, match=message):
            other.resume(tmp_path)
    short = AdapterJob(two()["b"].config, batches(2, count=3))
    with pytest.raises(ValueError, match="batches of 'b': ended after 3, expected at least the 4"):
        MultiLoRATrainer(llama(), {"b": short}).resume(tmp_path)
