"""Adapters go to PEFT and come back from it, with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_kernels.adapters import adapter_layers, apply_lora, load_adapter, save_adapter
from lora_kernels.integrations.peft import (
    MAGNITUDE,
    check_config,
    key_of,
    pattern_value,
    split_key,
)
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama, logits, wake

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"up_proj": 5},
    },
    "dora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 1}},
    "some layers": {"target_modules": ["q_proj", "1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*(k|gate)_proj"},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def peft_model(dtype: torch.dtype, **options):
    config = {"target_modules": "all-linear"} | options
    model = get_peft_model(llama(dtype), LoraConfig(r=4, lora_alpha=10, **config)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.normal_(std=0.1, generator=generator)
    return model


def assert_same_logits(ours: nn.Module, peft: nn.Module) -> None:
    theirs = logits(peft)
    got = logits(ours)
    assert got.dtype == theirs.dtype
    assert_within_budget(got, logits(peft.double()), theirs)


@options
@dtypes
def test_ours_loads_into_peft(tmp_path, options, dtype):
    model = llama(dtype)
    apply_lora(model, r=4, alpha=10, **options)
    save_adapter(wake(model), tmp_path)
    peft = PeftModel.from_pretrained(llama(dtype), tmp_path).eval()
    theirs = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in peft.named_modules()
        if hasattr(m, "lora_A")
    }
    assert theirs == {n: (m.r, m.scale) for n, m in adapter_layers(model)}
    assert_same_logits(model, peft)


@options
@dtypes
def test_pefts_loads_into_ours(tmp_path, options, dtype):
    peft = peft_model(dtype, lora_dropout=0.125, **options)
    peft.save_pretrained(tmp_path)
    model = llama(dtype)
    load_adapter(model, tmp_path)
    assert all(m.dropout == 0.125 for _, m in adapter_layers(model))
    theirs = {n for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert {f"base_model.model.{n}" for n, _ in adapter_layers(model)} == theirs
    assert_same_logits(model, peft)


def test_pefts_layer_selection(tmp_path):
    peft = peft_model(torch.float32, target_modules=["q_proj"], layers_to_transform=[1])
    peft.save_pretrained(tmp_path)
    model = llama()
    assert load_adapter(model, tmp_path).modules == ("model.layers.1.self_attn.q_proj",)
    assert_same_logits(model, peft)


def test_pefts_exclusions(tmp_path):
    peft = peft_model(torch.float32, target_modules=["q_proj"], exclude_modules=r".*\.0\..*")
    peft.save_pretrained(tmp_path)
    model = llama()
    assert load_adapter(model, tmp_path).modules == ("model.layers.1.self_attn.q_proj",)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_same_tensors_after_a_round_trip(tmp_path, use_dora):
    from safetensors.torch import load_file

    peft = peft_model(torch.bfloat16, use_dora=use_dora)
    peft.save_pretrained(tmp_path / "peft")
    model = llama(torch.bfloat16)
    load_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[k]) and t.dtype == b[k].dtype for k, t in a.items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"bias": "all"}, "bias: got 'all'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: got 'olora'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_neither_lora_nor_dora_is_refused(tmp_path, options, match):
    config = LoraConfig(r=4, target_modules=["q_proj"], **options)
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    model = llama()
    with pytest.raises(ValueError, match=match):
        load_adapter(model, tmp_path)
    assert not list(adapter_layers(model))


def test_a_gpt2_adapter_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(GPT2LMHeadModel(config), lora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="fan_in_fan_out: got True"):
        load_adapter(GPT2LMHeadModel(config), tmp_path)


def test_every_option_that_peft_writes_is_known(tmp_path):
    LoraConfig(r=4, target_modules=["q"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert check_config(written) == []
    assert check_config(written | {"use_magic": 1, "no_magic": None}) == ["use_magic"]


def test_keys():
    assert split_key(key_of("a.b", "A")) == ("a.b", "A")
    assert split_key("base_model.model.a.lora_B.default.weight") == ("a", "B")
    vector = "base_model.model.a.lora_magnitude_vector"
    assert key_of("a", MAGNITUDE) == vector
    for key in (vector, f"{vector}.default.weight"):
        assert split_key(key) == ("a", MAGNITUDE)
    for other in ("a.lora_A.weight", "base_model.model.a.lora_B.bias", key_of("a", "A") + "x"):
        assert split_key(other) is None


def test_patterns_are_matched_as_peft_does():
    from peft.utils.other import get_pattern_key

    patterns = {"x.q": 1, "q": 2, "^m.v": 3, r"\d+.k": 4, "a|b": 5}
    for name in ("m.x.q", "m.q", "q", "mq", "m.v", "n.m.v", "l.3.k", "l.k", "z.a", "b", "ab"):
        expected = patterns.get(get_pattern_key(patterns, name), 0)
        assert pattern_value(patterns, name, 0) == expected, name
