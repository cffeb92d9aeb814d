"""merge_adapters, unmerge_adapters, merge_and_unload, disable_adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels.adapters import (
    adapter_layers,
    apply_lora,
    disable_adapters,
    merge_adapters,
    merge_and_unload,
    unmerge_adapters,
)
from lora_kernels.nn import LoRAMixin, NF4Linear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama, logits, wake

quantised = pytest.mark.parametrize("quantize", [None, "nf4"])


def adapted(quantize=None, **options):
    model = llama(**options.pop("config", {}))
    apply_lora(model, r=4, quantize=quantize, **options)
    return wake(model)


def exact(model):
    """The logits in fp64, from the weights as they are stored."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NF4Linear:
                setattr(module, name, child.to_linear(dtype=torch.float32))
            elif isinstance(child, LoRAMixin) and isinstance(child, NF4Linear):
                setattr(module, name, child.to_linear(dtype=torch.float64))
    return logits(model.double())


@quantised
def test_merge_and_unmerge(quantize):
    model = adapted(quantize)
    before = logits(model)
    merge_adapters(model)
    assert all(layer.merged for _, layer in adapter_layers(model))
    merged = logits(model)
    merge_adapters(model)
    assert torch.equal(logits(model), merged)
    unmerge_adapters(model)
    assert torch.equal(logits(model), before)
    unmerge_adapters(model)
    assert_within_budget(merged, exact(adapted(quantize)), before)


@quantised
def test_a_refused_merge_merges_nothing(quantize):
    model = adapted(quantize)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_A[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: .*non-finite"):
        merge_adapters(model, safe=True)
    assert not any(layer.merged for _, layer in adapter_layers(model))
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: .*non-finite"):
        merge_and_unload(model, safe=True)
    assert len(list(adapter_layers(model))) == 14


@quantised
@pytest.mark.parametrize("merged", [False, True])
def test_disable_adapters(quantize, merged):
    model = adapted(quantize)
    if merged:
        merge_adapters(model)
    y = logits(model)
    with disable_adapters(model):
        base = logits(model)
        with disable_adapters(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), y) and not torch.equal(y, base)
    other = llama()
    apply_lora(other, r=4, quantize=quantize)
    assert_within_budget(base, exact(other), logits(_base(quantize)))
    with pytest.raises(RuntimeError, match="stop"), disable_adapters(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), y)


def _base(quantize):
    model = llama()
    apply_lora(model, r=4, quantize=quantize)
    return model


@quantised
def test_merge_and_unload(quantize):
    model = adapted(quantize)
    before = logits(model)
    assert merge_and_unload(model, safe=True) is model
    assert not hasattr(model, "lora_config")
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear | NF4Linear)}
    assert kinds == {nn.Linear}
    assert set(model.state_dict()) == set(llama().state_dict())
    assert_within_budget(logits(model), exact(adapted(quantize)), before)


def test_merge_and_unload_decodes_layers_without_an_adapter():
    model = adapted("nf4", target_modules=["q_proj"])
    y = logits(model)
    merge_and_unload(model)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert_within_budget(logits(model), exact(adapted("nf4", target_modules=["q_proj"])), y)


def test_merge_and_unload_into_4_bits():
    model = adapted("nf4", target_modules=["q_proj", "o_proj"])
    merge_adapters(model, requantize=True)
    y = logits(model)
    merge_and_unload(model, requantize=True)
    assert not list(adapter_layers(model))
    assert sum(type(m) is NF4Linear for m in model.modules()) == 14
    assert torch.equal(logits(model), y)


def test_an_adapted_tied_output_layer_is_untied(tmp_path):
    tied = {"config": {"tie_word_embeddings": True}}
    model = adapted(target_modules=["lm_head"], exclude_modules=(), **tied)
    with pytest.warns(UserWarning, match="tie_word_embeddings is False now"):
        merge_and_unload(model)
    y = logits(model)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(other), y)


@pytest.mark.parametrize("act", [merge_adapters, unmerge_adapters, merge_and_unload])
def test_a_model_without_adapters(act):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
        act(llama())
    with pytest.raises(ValueError, match="has no adapters"), disable_adapters(llama()):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_model_that_was_cast_afterwards(dtype, quantize, use_dora):
    """Merged it computes in the dtype that it was cast to, what it did before."""
    model = llama()
    apply_lora(model, 4, 8, quantize=quantize, use_dora=use_dora)
    wake(model).to(dtype)
    before = logits(model)
    merge_and_unload(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = logits(model)
    assert after.dtype == before.dtype == dtype
    exact = logits(copy.deepcopy(model).double())
    assert_within_budget(after, exact, before)
