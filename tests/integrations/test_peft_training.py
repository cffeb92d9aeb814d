"""Training an accelerated model of PEFT: the losses are PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import functional
from lora_kernels.integrations.peft import accelerate
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import VOCABULARY, llama, tokens
from tests.integrations.peft_models import (
    K,
    adapted,
    base_layer,
    exact,
    in_four_bit,
    inputs,
    layers,
    peft_llama,
)

STEPS = 8
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA, biases": {"use_rslora": True, "bias": "all", "lora_bias": True},
    "DoRA": {"use_dora": True},
    "QLoRA": {"four_bit": True},
    "QDoRA": {"four_bit": True, "use_dora": True},
    "MiCA": {"init_lora_weights": "mica"},
    "replicated": {"layer_replication": [(0, 2), (1, 2)]},
}


def make(four_bit: bool = False, **options: Any) -> Any:
    """A model in bf16 with adapters in fp32, as people train it."""
    base = llama(torch.bfloat16)
    return peft_llama(base=in_four_bit(base) if four_bit else base, **options)


def curve(model: Any) -> Tensor:
    """The log-probabilities [step, token, word] of which each step's loss is a mean."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        words = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        loss = torch.nn.functional.nll_loss(words, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(words.detach())
    return torch.stack(found)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_the_losses_are_pefts(options):
    ours = make(**options)
    report = accelerate(ours)
    assert report.accelerated and not report.left
    oracle, plain, got = curve(exact(make(**options))), curve(make(**options)), curve(ours)
    assert not torch.equal(plain[-1], plain[0])
    assert_within_budget(got, oracle.double(), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """The mask of the forward is that of the second forward, too."""
    grads = []
    for checkpointing in (False, True):
        model = peft_llama(lora_dropout=0.25)
        accelerate(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(6)
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 28
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_mask_is_the_seeds(use_dora):
    model = adapted(base_layer("Linear"), lora_dropout=0.25, use_dora=use_dora)
    accelerate(model)
    [layer] = layers(model)
    x = inputs(40, K)
    undropped = layer.eval()(x)
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    dropped = x * functional.dropout_mask([40, K], 0.25, seed) / 0.75
    assert not torch.equal(y, undropped)

    class Masked(torch.nn.Dropout):
        def forward(self, _: Tensor) -> Tensor:
            return dropped.to(_.dtype)

    results = []
    for made in (exact(model), model):
        own = layers(made)[0]
        own.lora_dropout["default"] = Masked(0.25)  # not torch's class: PEFT's own code runs
        p = own.base_layer.weight
        results.append(own.train()(x.to(p.dtype)))
    assert_within_budget(y, results[0], results[1])
    layer.lora_dropout["default"] = torch.nn.Dropout(1.0)
    assert "drops everything" in accelerate(model).left[0].reason


@pytest.mark.slow
def test_compiled():
    """One graph for the layers of a model, with PEFT's results."""
    model = peft_llama()
    accelerate(model)
    plain = model(tokens()).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens()).logits, plain)


def test_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": t, "labels": t} for t in tokens().repeat(4, 1)]
    found = []
    for accelerated in (True, False):
        model = peft_llama(task_type="CAUSAL_LM")
        if accelerated:
            accelerate(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accelerated)),
            max_steps=2,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        folder = tmp_path / str(accelerated) / "checkpoint-2"
        found.append({p.name for p in folder.iterdir()})
    assert found[0] == found[1] and "adapter_model.safetensors" in found[0]
