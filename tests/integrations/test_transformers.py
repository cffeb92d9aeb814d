"""Adapted models under transformers' own machinery."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels.adapters import adapter_layers, apply_lora, merge_and_unload
from lora_kernels.integrations.transformers import (
    base_model_name,
    is_conv1d,
    output_layer,
    task_type,
)
from tests.adapters.models import llama, logits, tokens, wake


def test_what_a_model_says_of_itself():
    model = llama()
    assert output_layer(model) is model.lm_head
    assert task_type(model) == "CAUSAL_LM"
    assert base_model_name(model) is None
    model.config._name_or_path = "some/model"
    assert base_model_name(model) == "some/model"
    plain = nn.Sequential(nn.Linear(2, 2))
    assert output_layer(plain) is None and task_type(plain) is None
    assert base_model_name(plain) is None and not is_conv1d(plain[0])


def test_a_merged_model_is_a_plain_one(tmp_path):
    model = llama()
    apply_lora(model, r=4, quantize="nf4")
    merge_and_unload(wake(model))
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_generate_with_a_cache():
    model = llama()
    apply_lora(model, r=4, quantize="nf4")
    wake(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(tokens(), use_cache=True, **options)
        plain = model.generate(tokens(), use_cache=False, **options)
    assert torch.equal(cached, plain)


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama()
    apply_lora(model, r=4, quantize="nf4")
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert all(layer.lora_B.any() for _, layer in adapter_layers(model))
