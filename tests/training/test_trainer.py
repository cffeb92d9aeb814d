"""Each adapter of a joint run against the same one trained alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_kernels import LoRAConfig
from lora_kernels.testing import assert_within_budget
from lora_kernels.training import AdapterJob, MultiLoRATrainer, NonFinite
from lora_kernels.training.loss import causal_loss
from tests.adapters.models import llama
from tests.training.jobs import alone, batches, jobs, weights


def sgd(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Keeps errors in proportion: Adam divides by gradients that are little but errors."""
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("optimizer", [None, sgd])
def test_each_adapter_learns_what_it_would_alone(quantize, dropout, optimizer):
    given = {name: replace(job, optimizer=optimizer) for name, job in jobs(dropout).items()}
    trainer = MultiLoRATrainer(llama(), given, quantize=quantize)
    losses = trainer.train(progress=False)
    assert trainer.finished and trainer.step() == {}
    # Of all adapters: what one step's rounding does to the next goes together in one of them.
    curves: list[list[float]] = [[], [], []]
    trained: dict[str, list[list[torch.Tensor]]] = {factor: [[], [], []] for factor in "AB"}
    for name, job in given.items():
        plain_losses, plain = alone(job, torch.float32, quantize)
        exact_losses, exact = alone(job, torch.float64, quantize)
        assert len(losses[name]) == len(set(plain_losses)) == len(plain_losses)
        for curve, of_name in zip(curves, (losses[name], exact_losses, plain_losses), strict=True):
            curve += of_name
        got = weights(trainer.runs[name].layers)
        assert got.keys() == exact.keys()
        for factor, joined in trained.items():
            for values, found in zip(joined, (got, exact, plain), strict=True):
                values += [t.flatten() for key, t in found.items() if key.endswith(factor)]
    if optimizer is not None:
        for factor, joined in trained.items():
            assert_within_budget(*map(torch.cat, joined), factor)
    actual, oracle, plain_curve = (torch.tensor(c, dtype=torch.float64) for c in curves)
    assert_within_budget(actual.float(), oracle, plain_curve.float(), "losses")


def two(**options) -> dict[str, AdapterJob]:
    return {
        "a": AdapterJob(LoRAConfig(r=3, dropout=0.1), batches(1, count=2), **options),
        "b": AdapterJob(LoRAConfig(r=20, dropout=0.2), batches(2, length=11, left=3), **options),
    }


def test_what_fills_up_changes_nothing():
    runs = [MultiLoRATrainer(llama(), two(lr=1e-2), pad_id=pad).train() for pad in (0, 99)]
    assert runs[0] == runs[1]


def test_position_ids_of_ones_own():
    """Those that start behind the padding on the left, beside an adapter that brings none."""
    given = two(lr=1e-2)
    with_positions = [
        {**b, "position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        for b in given["b"].batches
    ]
    job = replace(given["b"], batches=with_positions)
    together = MultiLoRATrainer(llama(), {"a": given["a"], "b": job}).train()
    single = MultiLoRATrainer(llama(), {"b": job}).train()
    without = MultiLoRATrainer(llama(), given).train()
    assert together["a"] == without["a"]
    assert together["b"] == pytest.approx(single["b"])
    assert together["b"] != without["b"]


def _packed(seed: int, documents: tuple[int, ...] = (3, 5, 2)) -> list[dict[str, Tensor]]:
    """Several documents in each row, and no mask."""
    positions = torch.cat([torch.arange(n) for n in documents]).expand(2, -1)
    made = batches(seed, count=2, length=sum(documents))
    return [{**b, "position_ids": positions} for b in made if b.pop("attention_mask") is not None]


@pytest.mark.parametrize("left", [0, 4])
def test_packed_documents_stay_apart(left: int):
    """Beside another adapter's padding, shorter and longer rows."""
    options = {"lr": 1e-2, "seed": 3}
    packed = AdapterJob(LoRAConfig(r=3, dropout=0.1), _packed(1), **options)
    jobs = {
        "packed": packed,
        "other": AdapterJob(LoRAConfig(r=4), batches(2, count=2, length=12, left=left), **options),
        "long": AdapterJob(LoRAConfig(r=2), _packed(4, documents=(7, 6)), **options),
    }
    together = MultiLoRATrainer(llama(), jobs).train()
    for name, job in jobs.items():
        single = MultiLoRATrainer(llama(), {name: job}).train()
        assert together[name] == pytest.approx(single[name])

    batch = packed.batches[0]
    documents = zip(*(v.split((3, 5, 2), dim=1) for v in (batch["input_ids"],)), strict=True)
    logits = torch.cat([llama()(ids).logits for (ids,) in documents], dim=1).detach()
    assert together["packed"][0] == pytest.approx(float(causal_loss(logits, batch["labels"])))

    masked = [{**b, "attention_mask": torch.ones_like(b["labels"])} for b in packed.batches]
    kept = MultiLoRATrainer(llama(), {"packed": replace(packed, batches=masked)}).train()
    assert kept["packed"][0] != pytest.approx(together["packed"][0], rel=1e-4)


def test_an_absent_adapter_stays_as_it_is():
    trainer = MultiLoRATrainer(llama(), two(lr=1e-2))
    trainer.train(2)
    a, b = trainer.runs.values()
    assert a.finished and not b.finished
    before = weights(a.layers), weights(b.layers), a.generator.get_state()
    assert list(trainer.step()) == ["b"]
    assert all(torch.equal(t, before[0][key]) for key, t in weights(a.layers).items())
    assert not any(torch.equal(t, before[1][key]) for key, t in weights(b.layers).items())
    assert torch.equal(a.generator.get_state(), before[2])
    assert all(p.grad is None for run in (a, b) for p in run.parameters)
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("sign", ["loss", "gradient"])
def test_an_adapter_that_is_not_finite_stops_alone(tmp_path, sign):
    """The others have what they would without it, to the bit, and what it had saved stays."""

    def spoiled(logits: Tensor, labels: Tensor) -> Tensor:
        loss = causal_loss(logits, labels)
        if logits.shape[1] == 7 and bool(armed):  # that of "a"
            # In the second case of the gradient alone: the root has none at 0.
            loss = loss * float("nan") if sign == "loss" else loss + (loss - loss.detach()).sqrt()
        return loss

    armed: list[bool] = []
    given = {name: replace(job, steps=4) for name, job in two(lr=1e-2).items()}
    sane = MultiLoRATrainer(llama(), given)
    trainer = MultiLoRATrainer(llama(), given, loss=spoiled)
    trainer.train(2)
    before, files = weights(trainer.runs["a"].layers), trainer.save(tmp_path)
    kept = {path.name: path.read_bytes() for path in files["a"].iterdir()}
    armed.append(True)
    with pytest.raises(NonFinite, match=rf"'a': the {sign}.* of step 3 is nan") as caught:
        trainer.train()
    assert list(caught.value.adapters) == ["a"]
    expected = sane.train()
    assert trainer.losses == {"a": expected["a"][:2], "b": expected["b"]}
    got, alone = (weights(t.runs["b"].layers) for t in (trainer, sane))
    assert all(torch.equal(t, alone[key]) for key, t in got.items())
    assert all(torch.equal(t, before[k]) for k, t in weights(trainer.runs["a"].layers).items())
    assert trainer.finished and trainer.step() == {}
    assert list(trainer.save(tmp_path)) == ["b"]
    assert {path.name: path.read_bytes() for path in files["a"].iterdir()} == kept
    armed.clear()
    trainer.resume(tmp_path)
    assert trainer.train() == expected


def test_a_step_says_which_adapter_failed_and_goes_on_without_it():
    given = two(lr=1e-2)
    trainer = MultiLoRATrainer(llama(), {**given, "a": replace(given["a"], lr=1e30)})
    trainer.step()
    with pytest.raises(NonFinite, match="'a': the loss of step 2 is nan") as caught:
        trainer.step()
    assert list(caught.value.losses) == ["b"]
    assert list(trainer.step()) == ["b"]


def test_checkpointed_layers_drop_the_same_again():
    def run(checkpointing: bool) -> dict[str, list[float]]:
        model = llama()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return MultiLoRATrainer(model, two(lr=1e-2)).train()

    assert run(True) == run(False)


def test_an_error_leaves_every_adapter_where_it_was():
    given = two(lr=1e-2)
    spoiled = [*batches(1, count=1), {"input_ids": torch.zeros(1, 2)}]
    trainer = MultiLoRATrainer(llama(), {**given, "a": replace(given["a"], batches=spoiled)})
    trainer.step()
    before = trainer.losses
    for _ in range(2):
        with pytest.raises(ValueError, match="batches of 'a': labels is missing, got input_ids"):
            trainer.step()
    assert trainer.losses == before
    assert [run.step for run in trainer.runs.values()] == [1, 1]


def test_detached_the_model_is_its_base_again():
    model = llama()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    trainer = MultiLoRATrainer(model, two())
    with pytest.raises(ValueError, match=r"has adapters in training .*detach_adapters"):
        MultiLoRATrainer(model, two())
    trainer.train(1)
    assert len(trainer.detach()) == 14
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[key]) for key, t in after.items())


def test_on_step_and_the_number_of_steps():
    seen = []
    trainer = MultiLoRATrainer(llama(), two())
    trainer.train(3, on_step=lambda done, losses: seen.append((done, sorted(losses))))
    assert seen == [(1, ["a", "b"]), (2, ["a", "b"]), (3, ["b"])]
    assert not trainer.finished and len(trainer.train()["b"]) == 4


class Tiny(torch.nn.Module):
    """No transformers model: a plain one that takes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 32)
        self.up = torch.nn.Linear(32, 48)
        self.head = torch.nn.Linear(48, 100, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(self.embed(input_ids))) * attention_mask[..., None])


def test_any_model_and_any_loss():
    def halved(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return causal_loss(logits, labels) / 2

    job = AdapterJob(LoRAConfig(r=4, target_modules=("up", "head"), exclude_modules=()), batches(1))
    torch.manual_seed(0)
    model = Tiny()
    whole = MultiLoRATrainer(copy.deepcopy(model), {"x": job}).train(1)["x"]
    half = MultiLoRATrainer(model, {"x": job}, loss=halved).train(1)["x"]
    assert half == [whole[0] / 2]
