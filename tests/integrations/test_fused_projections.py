"""fuse_projections in transformers' models: forward, backward, generate, checkpointing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import VOCABULARY, llama, tokens, wake

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
OF_BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": VOCABULARY}
OF_BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
OF_BART |= {f"{part}_ffn_dim": 96 for part in ("encoder", "decoder")}


def _model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if family == "Bart":
        config = transformers.BartConfig(**OF_BART)
        return transformers.BartForConditionalGeneration(config).eval()
    task = "ForMaskedLM" if family == "Bert" else "ForCausalLM"
    few = {"num_key_value_heads": 2} if family in ("Llama", "Qwen2", "Qwen3") else {}
    few |= {"head_dim": 16} if family == "Qwen3" else {}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**SMALL, **few, **ids)
    return getattr(transformers, family + task)(config).eval()


QKV, GATE_UP = "q_proj + k_proj + v_proj", "gate_proj + up_proj"
FAMILIES = {
    "Llama": f"2 x {QKV}, 2 x {GATE_UP}",
    "Qwen2": f"2 x {QKV}, 2 x {GATE_UP}",
    "Qwen3": f"2 x {QKV}, 2 x {GATE_UP}",
    "Bert": "2 x query + key + value",
    "GPTNeoX": "none",
    # k and v of the encoder's states; q, of the decoder's, has no sibling.
    "Bart": "3 x k_proj + v_proj",
}


def _pair(family: str, **options: Any) -> tuple[Any, Any]:
    apart = _model(family)
    lk.apply_lora(apart, 4, 8, **options)
    wake(apart)
    fused = copy.deepcopy(apart)
    lk.fuse_projections(fused)
    return apart, fused


def _grads(model: Any, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Logits bit for bit; gradients through the budget, for dx is summed in another order."""
    apart, fused = _pair(family, dropout=0.0)
    report = lk.fuse_projections(fused)
    assert str(report).splitlines()[0] == f"run as one: {FAMILIES[family]}"
    batch = {"input_ids": tokens()}
    ran = [e.op for e in lk.explain(lambda: fused(**batch))]
    assert ran.count("lora_packed_fwd") == len(report.groups)
    assert ran.count("lora_linear_fwd") == len(report.alone)
    with torch.no_grad():
        assert torch.equal(fused(**batch).logits, apart(**batch).logits)
    plain, got = _grads(apart, **batch), _grads(fused, **batch)
    oracle = _grads(apart.double(), **batch)
    assert got.keys() == plain.keys()
    for name in got:
        assert_within_budget(got[name], oracle[name], plain[name], name)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate(quantize, dtype):
    """With a cache, beams and left padding: the same tokens, by far fewer calls."""
    apart = llama(dtype)
    lk.apply_lora(apart, 4, quantize=quantize)
    wake(apart)
    fused = copy.deepcopy(apart)
    lk.fuse_projections(fused)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0}
    for way in ({"do_sample": False}, {"num_beams": 2}):
        made = [model.generate(tokens(), **options, **way) for model in (apart, fused)]
        assert torch.equal(*made)
    ops = [e.op for e in lk.explain(lambda: fused.generate(tokens(), **options, do_sample=False))]
    assert (ops.count("lora_packed_fwd"), ops.count("lora_linear_fwd")) == (5 * 4, 5 * 4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradient_checkpointing(quantize, reentrant):
    _, fused = _pair("Llama", dropout=0.3, quantize=quantize)
    fused.train()
    batch = {"input_ids": tokens()}
    expected = _grads(fused, **batch)
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    got = _grads(fused, **batch)
    assert got.keys() == expected.keys() and len(got) == 28
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_evaluation_between_training_steps():
    _, fused = _pair("Llama", dropout=0.3)
    batch = {"input_ids": tokens()}
    before = _grads(fused.train(), **batch)
    with torch.inference_mode():
        first = fused.eval()(**batch).logits
        assert torch.equal(first, fused(**batch).logits)
    after = _grads(fused.train(), **batch)
    assert all(torch.equal(before[name], after[name]) for name in before)
