"""A model with a pool attached takes no adapters of its own, whichever layers the pool has."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import apply_lora, load_adapter, save_adapter
from lora_kernels.serving import AdapterPool, attach_pool, detach_pool
from tests.adapters.models import llama, wake
from tests.training.jobs import jobs

TARGETS = (["q_proj", "v_proj"], ["embed_tokens"], ["lm_head"])


def _pooled(targets):
    model = llama()
    attach_pool(model, AdapterPool(model, slots=2, pages=2, target_modules=targets))
    return model


def _train(model):
    from lora_kernels.training import MultiLoRATrainer

    return MultiLoRATrainer(model, {"a": next(iter(jobs(False).values()))})


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_pooled_model_is_refused_as_it_is(targets, tmp_path):
    other = llama()
    apply_lora(other, r=2, target_modules=["q_proj"])
    save_adapter(wake(other), tmp_path)
    model = _pooled(targets)
    before = {n: type(m) for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    for call in (
        lambda: apply_lora(model),
        lambda: apply_lora(model, target_modules=["q_proj"], quantize="nf4"),
        lambda: apply_lora(model, target_modules=["base"]),
        lambda: load_adapter(model, tmp_path),
        lambda: load_adapter(model, tmp_path, strict=False),
        lambda: _train(model),
        lambda: AdapterPool(model, slots=1, pages=1),
        lambda: attach_pool(model, AdapterPool(llama(), slots=1, pages=1)),
    ):
        with pytest.raises(ValueError, match=r"has a pool already; serving.detach_pool removes it"):
            call()
    assert before == {n: type(m) for n, m in model.named_modules()}
    assert grads == {n: p.requires_grad for n, p in model.named_parameters()}
    detach_pool(model)
    assert load_adapter(model, tmp_path).modules == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    )
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
