"""What a joint run refuses, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.serving import AdapterPool, attach_pool
from lora_kernels.training import AdapterJob, Batch, MultiLoRATrainer
from tests.adapters.models import llama
from tests.training.jobs import batches

CONFIG = LoRAConfig(r=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: got 0, expected at least 1"),
        ({"steps": 1.5}, TypeError, "steps: got 1.5, expected an int"),
        ({"lr": float("nan")}, ValueError, "lr: got nan, expected a finite number"),
        ({"weight_decay": "0"}, TypeError, "weight_decay: got '0', expected a number"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm: got -1"),
        ({"schedule": "step"}, ValueError, "schedule: got 'step', expected one of constant"),
        ({"warmup": -1}, ValueError, "warmup: got -1, expected at least 0"),
        ({"batches": []}, ValueError, "batches: got none, expected one or more"),
        ({"batches": 3}, TypeError, "batches: got int, expected an iterable"),
        ({"batches": iter([]), "schedule": "linear"}, ValueError, "steps: got None with schedule"),
        ({"config": LoRAConfig(use_dora=True)}, ValueError, "config.use_dora: got True"),
        ({"config": {"r": 3}}, TypeError, "config: got dict, expected LoRAConfig"),
    ],
)
def test_jobs(options, error, message):
    with pytest.raises(error, match=message):
        AdapterJob(**({"config": CONFIG, "batches": batches(1)} | options))


IDS = torch.zeros(2, 3, dtype=torch.int64)
GOOD = {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ([1], TypeError, "batches of 'x': got list, expected a mapping"),
        ({"labels": IDS}, ValueError, "batches of 'x': input_ids is missing, got labels"),
        (GOOD | {"pixels": IDS}, ValueError, "got 'pixels', expected some of input_ids"),
        (GOOD | {"labels": [1]}, TypeError, "labels: got list, expected a tensor"),
        (GOOD | {"labels": IDS.float()}, TypeError, "labels: got dtype float32, expected int64"),
        (GOOD | {"labels": IDS[:1]}, ValueError, r"labels: got shape \[1, 3\], expected \[2, 3\]"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, ValueError, r"input_ids: got shape \[3\]"),
        (GOOD | {"labels": IDS - 100}, ValueError, "labels: got none to learn"),
        ({"input_ids": IDS[:, :1], "labels": IDS[:, :1]}, ValueError, "labels: got none to learn"),
    ],
)
def test_micro_batches(part, error, message):
    with pytest.raises(error, match=message):
        Batch.join({0: ("x", part)}, CPU)


def test_joined_batches():
    left = batches(1, rows=1, length=4, left=1, count=1)[0]
    joined = Batch.join({2: ("x", GOOD), 5: ("y", left)}, CPU, pad_id=7)
    assert joined.slots.tolist() == [[2, 2, 2, -1]] * 2 + [[5] * 4]
    assert joined.slots.dtype == torch.int32
    assert joined.inputs["input_ids"].tolist() == [[0, 0, 0, 7]] * 2 + left["input_ids"].tolist()
    assert joined.inputs["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2 + [[0, 1, 1, 1]]
    assert joined.labels[:2].tolist() == [[0, 0, 0, -100]] * 2
    assert joined.rows == {2: (slice(0, 2), 3), 5: (slice(2, 3), 4)}
    with pytest.raises(ValueError, match="parts: got none"):
        Batch.join({}, CPU)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "jobs: got {}, expected one or more by name"),
        ({"a/b": 1}, ValueError, "jobs: got 'a/b' as a name"),
        ({3: 1}, TypeError, "jobs: got 3 as a name, expected a string"),
        ({"a": 1}, TypeError, r"jobs\['a'\]: got int, expected AdapterJob"),
        ({"a": AdapterJob(LoRAConfig(target_modules=("none",)), [GOOD])}, ValueError, "'none'"),
    ],
)
def test_trainers(given, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        MultiLoRATrainer(model, given)
    assert all(p.requires_grad for p in model.parameters())  # nothing was changed


def test_models():
    job = {"a": AdapterJob(CONFIG, [GOOD])}
    adapted = llama()
    apply_lora(adapted)
    pooled = llama()
    attach_pool(pooled, AdapterPool(pooled, slots=1, pages=1))
    meta = llama().to("meta")
    for model, message in (
        (adapted, "has adapters on 14 layers already"),
        (pooled, "has a pool already; serving.detach_pool removes it"),
        (meta, "model: is on meta, expected one device that holds values"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiLoRATrainer(model, job)
    training = llama()
    MultiLoRATrainer(training, job)
    with pytest.raises(ValueError, match="has adapters in training"):
        AdapterPool(training, slots=1, pages=1)


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.up(input_ids.float())[0]


def test_a_model_without_logits_and_data_that_ends():
    trainer = MultiLoRATrainer(Wrong(), {"a": AdapterJob(CONFIG, [GOOD])})
    with pytest.raises(ValueError, match=r"up: slots: got shape|model: gives \[3\], expected log"):
        trainer.step()
    once = AdapterJob(CONFIG, iter(batches(1, count=1)), steps=2)
    trainer = MultiLoRATrainer(llama(), {"a": once})
    trainer.step()
    with pytest.raises(ValueError, match="batches of 'a': ended after 1 steps, expected 2"):
        trainer.step()


def test_packed_documents_have_a_batch_of_their_own():
    packed = {**GOOD, "position_ids": torch.tensor([[0, 1, 0]] * 2)}
    together = {**packed, "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    for part in (packed, together):
        assert ("attention_mask" in Batch.join({0: ("x", part)}, CPU).inputs) == (part is together)
    with pytest.raises(ValueError, match="parts: got packed documents beside others"):
        Batch.join({0: ("x", packed), 1: ("y", together)}, CPU)
