"""apply_lora: which layers, with what, and what it reports."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

from lora_kernels.adapters import LoRAConfig, adapter_layers, apply_lora
from lora_kernels.dispatch import use_backend
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import (
    LLAMA_LAYERS,
    assert_training_moves_trainable_only,
    llama,
    logits,
    mlp,
    tokens,
    wake,
)


def test_all_linear_leaves_the_output_layer():
    model = llama()
    report = apply_lora(model, r=4)
    assert len(report.modules) == LLAMA_LAYERS
    assert type(model.lm_head) is nn.Linear
    assert report.skipped == (("lm_head", "excluded"),)
    kinds = {type(layer) for _, layer in adapter_layers(model)}
    assert kinds == {LoRALinear}
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{m}.lora_{x}" for m in report.modules for x in "AB"}
    assert model.lora_config == LoRAConfig(r=4)


def test_the_output_layer_is_left_whatever_it_is_called():
    model = llama()
    report = apply_lora(model, r=4, exclude_modules=())
    assert type(model.lm_head) is nn.Linear
    assert report.skipped == (("lm_head", "output layer"),)
    assert apply_lora(mlp(), r=4).modules == ("up", "down", "head")


def test_a_new_adapter_changes_no_logits():
    model = llama()
    before = logits(model)
    apply_lora(model, r=4)
    # Adding zeros is exact where the base is computed apart from the branch.
    with use_backend("reference"):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], (), {"q_proj": 2}),
        (("q_proj", "mlp.up_proj"), (), {"q_proj": 2, "up_proj": 2}),
        ({"model.layers.1.self_attn.v_proj"}, (), {"v_proj": 1}),
        (r".*\.(q|v)_proj", (), {"q_proj": 2, "v_proj": 2}),
        (r".*layers\.0\..*_proj", (), dict.fromkeys("qkvo", 1) | {"gate": 1, "up": 1, "down": 1}),
        (["lm_head"], (), {"lm_head": 1}),
        (["q_proj", "k_proj"], ["layers.0.self_attn.q_proj"], {"q_proj": 1, "k_proj": 2}),
        ("ALL-linear", r".*mlp.*|lm_head", dict.fromkeys("qkvo", 2)),
    ],
)
def test_matching(targets, exclude, expected):
    report = apply_lora(llama(), r=2, target_modules=targets, exclude_modules=exclude)
    counts: dict[str, int] = {}
    for name in report.modules:
        last = name.rsplit(".", 1)[-1]
        counts[last] = counts.get(last, 0) + 1
    full = {k if "_" in k else f"{k}_proj": v for k, v in expected.items()}
    assert counts == full


def test_matching_is_pefts():
    from peft import LoraConfig, get_peft_model

    for targets in (["q_proj", "1.mlp.up_proj"], r".*\.1\..*(k|down)_proj", "all-linear"):
        peft = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets))
        theirs = {
            n.removeprefix("base_model.model.")
            for n, m in peft.named_modules()
            if hasattr(m, "lora_A")
        }
        assert set(apply_lora(llama(), r=2, target_modules=targets).modules) == theirs


def test_patterns():
    model = llama()
    apply_lora(
        model,
        r=4,
        alpha=8,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 6, "^model.*down_proj": 1},
        alpha_pattern={"up_proj": 3.5},
        use_rslora=True,
        dropout=0.25,
        init="gaussian",
    )
    layers = dict(adapter_layers(model))
    assert layers["model.layers.0.self_attn.q_proj"].r == 2
    assert layers["model.layers.1.self_attn.q_proj"].r == 6
    assert layers["model.layers.1.mlp.down_proj"].r == 1
    assert layers["model.layers.1.mlp.gate_proj"].r == 4
    assert layers["model.layers.0.mlp.up_proj"].scale == 3.5 / 2
    assert all(m.use_rslora and m.dropout == 0.25 and m.init == "gaussian" for m in layers.values())


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
def test_quantize(quantize):
    model = llama(torch.bfloat16)
    report = apply_lora(model, r=4, quantize=quantize, block_size=32, double_quant=False)
    layers = dict(adapter_layers(model))
    assert {type(m) for m in layers.values()} == {QLoRALinear}
    weight = layers["model.layers.0.mlp.up_proj"].weight
    assert (weight.quant_type, weight.block_size, weight.is_nested) == (quantize, 32, False)
    assert report.quantized == report.modules
    assert report.bytes_after < report.bytes_before
    assert type(model.lm_head) is nn.Linear
    assert logits(model).dtype == torch.bfloat16


def test_the_rest_of_the_base_is_quantised_too():
    model = llama()
    report = apply_lora(model, r=4, target_modules=["q_proj"], quantize="nf4")
    assert type(model.model.layers[0].mlp.up_proj) is NF4Linear
    assert type(model.model.layers[0].self_attn.q_proj) is QLoRALinear
    assert type(model.lm_head) is nn.Linear
    assert len(report.modules) == 2 and len(report.quantized) == LLAMA_LAYERS


def test_each_dense_weight_is_freed_before_the_next():
    model = llama()
    alive = [weakref.ref(m) for m in model.modules() if type(m) is nn.Linear]
    head = weakref.ref(model.lm_head)
    seen = []

    def watch(done: int, total: int, name: str) -> None:
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))
        assert total == LLAMA_LAYERS

    apply_lora(model, r=4, quantize="nf4", progress=watch)
    assert head() is not None
    assert seen == [1 + LLAMA_LAYERS - done for done in range(LLAMA_LAYERS + 1)]


def test_a_tied_weight_stays_dense_and_tied():
    model = llama(tie_word_embeddings=True)
    report = apply_lora(
        model, r=4, target_modules=["lm_head", "q_proj"], exclude_modules=(), quantize="nf4"
    )
    assert type(model.lm_head) is LoRALinear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ("lm_head", "weight is tied, kept dense") in report.skipped
    assert "lm_head" not in report.quantized
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_one_layer_in_two_places_stays_one():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = apply_lora(model, r=2)
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)
    assert report.modules == ("0",)


def test_nf4_layers_get_an_adapter():
    model = mlp()
    model.up = NF4Linear.from_linear(model.up)
    packed = model.up.packed
    apply_lora(model, r=2, target_modules=["up"])
    assert type(model.up) is QLoRALinear and model.up.packed is packed


def test_heads_are_not_quantised_unless_asked():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = llama().config
    assert isinstance(config, LlamaConfig)
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config)
    report = apply_lora(model, r=2, quantize="nf4")
    assert type(model.score) is nn.Linear and len(report.modules) == LLAMA_LAYERS
    assert report.modules_to_save == ("score",)
    model = LlamaForSequenceClassification(config)
    options = {"target_modules": ["score"], "quantize": "nf4"}
    with pytest.raises(ValueError, match=r"matches only score, which modules_to_save trains whole"):
        apply_lora(model, r=2, **options)
    apply_lora(model, r=2, modules_to_save=[], **options)
    assert type(model.score) is QLoRALinear


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["q_proj", "nope"]}, r"\['nope'\] matches no layer.*Candidates: down"),
        ({"target_modules": "q_proj"}, r"pass \['q_proj'\] to match the end"),
        ({"target_modules": []}, "target_modules: got nothing"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": ["lm_head"]}, "but those that exclude_modules"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens .is a Embedding, not torch.nn.Linear"),
        ({"target_modules": ["mlp"]}, "model.layers.0.mlp .is a LlamaMLP"),
        ({"exclude_modules": ".*"}, "has no linear layer to adapt; left alone: model.layers.0"),
        ({"rank_pattern": {"nope": 3}}, "rank_pattern: 'nope' matches none of the 14"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: r: got 0"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, r"alpha_pattern\['q_proj'\]: alpha: got nan"),
        ({"r": 0}, "r: got 0"),
        ({"dropout": 1.5}, "dropout: got 1.5"),
        ({"init": "pissa"}, "init: got 'pissa'"),
        ({"quantize": "int8"}, "^quantize: got 'int8'"),
        ({"quantize": "nf4", "block_size": 5}, "block_size: got 5"),
    ],
)
def test_bad_options_change_nothing(options, match):
    model = llama()
    with pytest.raises(ValueError, match=match):
        apply_lora(model, **options)
    assert not hasattr(model, "lora_config")
    assert all(p.requires_grad for p in model.parameters())
    assert not list(adapter_layers(model))


def test_bad_types():
    for options in ({"target_modules": 3}, {"target_modules": [1]}, {"rank_pattern": [2]}):
        with pytest.raises(TypeError, match=next(iter(options))):
            apply_lora(mlp(), **options)
    with pytest.raises(TypeError, match=r"rank_pattern\['up'\]: r: got 2.5"):
        apply_lora(mlp(), rank_pattern={"up": 2.5})
    with pytest.raises(TypeError, match="model: got dict"):
        apply_lora({})


def test_what_takes_no_adapters():
    model = mlp()
    apply_lora(model, r=2)
    with pytest.raises(ValueError, match="has adapters on 3 layers already"):
        apply_lora(model, r=2)
    with pytest.raises(ValueError, match="compiled already"):
        apply_lora(torch.compile(mlp()))
    with pytest.raises(ValueError, match=r"LoRALinear.from_linear"):
        apply_lora(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no linear layer to adapt"):
        apply_lora(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 1)))
    with torch.device("meta"):
        meta = mlp()
    with pytest.raises(ValueError, match="weight of up is on the meta device"):
        apply_lora(meta, r=2, quantize="nf4")


def test_a_model_with_peft_adapters_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT adapters already"):
        apply_lora(model)


def test_conv1d_is_listed():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(ValueError, match=r"left alone: .*transformer.h.0.attn.c_attn.*Conv1D"):
        apply_lora(GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match=r"c_attn.*fan_in_fan_out"):
        apply_lora(GPT2LMHeadModel(config), target_modules=["c_attn"])


def test_multi_head_attention_reads_weights_without_calling():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        apply_lora(attention)
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        apply_lora(attention, target_modules=["out_proj"])


def test_the_fused_encoder_path_does_not_pass_the_adapters_by():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ).eval()
    apply_lora(encoder, r=2)
    wake(encoder)
    x = torch.randn(2, 5, 16)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    with torch.no_grad():
        fused = encoder(x, src_key_padding_mask=mask)
    slow = encoder(x, src_key_padding_mask=mask).detach()
    assert_within_budget(fused[~mask], slow[~mask].double(), slow[~mask])


@pytest.mark.parametrize(
    ("value", "options", "error", "match"),
    [
        (float("nan"), {}, ValueError, r"^head: weight: holds 1 non-finite .* flat index 70$"),
        (float("-inf"), {"target_modules": ["up"]}, ValueError, "^head: weight: holds 1 non-"),
        (1e39, {}, ValueError, "^head: weight: holds 1 non-finite"),  # finite in fp64 alone
        (0.0, {"adapter_dtype": torch.int8}, TypeError, "^adapter_dtype: got int8"),
        (0.0, {"progress": True}, ImportError, "tqdm"),
    ],
)
def test_an_error_comes_before_any_change(value, options, error, match, monkeypatch):
    model = mlp().double()
    with torch.no_grad():
        model.head.weight[1, 6] = value
    modules, state = dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    with pytest.raises(error, match=match):
        apply_lora(model, r=2, quantize="nf4", **options)
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert after.keys() == state.keys() and all(after[name] is p for name, p in state.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "lora_config")


def test_a_non_finite_weight_that_stays_dense_is_no_error():
    model = mlp()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    apply_lora(model, r=2, exclude_modules=["head"], quantize="nf4")
    assert type(model.up) is QLoRALinear and type(model.head) is nn.Linear


def test_the_report():
    model = llama(torch.bfloat16)
    dense = sum(p.nbytes for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    report = apply_lora(model, r=4, quantize="nf4")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_parameters == trainable
    assert report.total_parameters == count + trainable
    buffers = [b for n, b in model.named_buffers() if "rotary" not in n]
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    assert report.bytes_before == dense + rotary
    after = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in buffers)
    assert report.bytes_after == after + rotary
    text = str(report)
    for part in (f"{trainable:,} of {count + trainable:,}", "q_proj", "nf4/64 nested", "lm_head"):
        assert part in text
    assert len(text.splitlines()) == 11


def test_training_moves_the_adapters_only():
    model = llama().train()
    apply_lora(model, r=4, quantize="nf4", dropout=0.1)
    assert_training_moves_trainable_only(model, steps=8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_model(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = llama().train()
        torch.manual_seed(4)
        apply_lora(model, r=4, dropout=0.2)
        wake(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][name]), name
