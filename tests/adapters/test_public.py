"""apply_lora by a configuration, ours or PEFT's; a 4-bit base without adapters; taking them off."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import adapter_layers
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import LLAMA_LAYERS, llama, logits, mlp, tokens, wake

SAME = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*(k|gate)_proj"},
    "all": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "dora": {"target_modules": ["up_proj"], "use_dora": True, "use_rslora": True},
    "excluded": {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "none named": {},
}


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("by_name", [False, True])
def test_peft_s_configuration_gives_what_peft_makes(case, by_name):
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **SAME[case])
    theirs = get_peft_model(llama(), copy.deepcopy(config)).eval()
    model = llama()
    report = lk.apply_lora(model, config=config) if by_name else lk.apply_lora(model, config)
    wanted = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = {_peft_name(n) for n, p in model.named_parameters() if p.requires_grad}
    assert ours == wanted and report.modules
    _copy_into(model, theirs)
    plain = logits(theirs)
    assert_within_budget(logits(model), logits(copy.deepcopy(theirs).double()), plain)
    assert all(layer.dropout == 0.1 for _, layer in adapter_layers(model))


def _peft_name(name: str) -> str:
    if name.endswith("trainable_tokens_delta"):
        return name.replace("trainable_tokens", "token_adapter.trainable_tokens") + ".default"
    return name + ".default.weight" if "lora_" in name else name


def _copy_into(model, theirs) -> None:
    generator = torch.Generator().manual_seed(3)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    values = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default.", "."): p
        for n, p in theirs.named_parameters()
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(values[_peft_name(name)])


REFUSED = {
    "layers_to_transform": {"layers_to_transform": [0]},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "target_parameters": {"target_parameters": ["up_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "eva_config": {"eva_config": {"rho": 2.0}},
}
REFUSED_INIT = [False, "eva", "orthogonal", "olora"]


@pytest.mark.parametrize("option", REFUSED)
def test_what_peft_has_and_we_have_not_is_named(option):
    config = LoraConfig(target_modules=["q_proj"])
    for name, value in REFUSED[option].items():
        setattr(config, name, value)
    model = llama()
    with pytest.raises(ValueError, match=f"{option}: got "):
        lk.apply_lora(model, config)
    assert not list(adapter_layers(model))


@pytest.mark.parametrize("init", REFUSED_INIT)
def test_initialisations_of_peft_s_that_would_be_another_here(init):
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights: got {init!r}"):
        lk.apply_lora(llama(), config)


def test_our_configuration():
    config = lk.LoRAConfig(r=3, alpha=5, dropout=0.2, target_modules=["up"], use_dora=True)
    for given in ({"r": config}, {"config": config}):
        model = mlp()
        report = lk.apply_lora(model, quantize="nf4", **given)
        assert report.modules == ("up",) and model.lora_config == config
        assert (model.up.r, model.up.alpha, model.up.dropout) == (3, 5, 0.2)
        assert type(model.up) is QLoRALinear and model.up.use_dora
    for options, match in (
        ({"alpha": 7}, "alpha: got 7 beside a configuration"),
        ({"target_modules": ["down"]}, "target_modules: got list beside a configuration"),
        ({"config": config}, "config: was given twice"),
    ):
        with pytest.raises(TypeError, match=match):
            lk.apply_lora(mlp(), config, **options)
    for wrong in ({"r": 4}, object(), "config.json", 3):
        with pytest.raises(TypeError, match=r"config: got .*expected LoRAConfig or PEFT's"):
            lk.apply_lora(mlp(), config=wrong)
    with pytest.raises(TypeError, match=r"r: got dict, expected an int, a LoRAConfig or PEFT's"):
        lk.apply_lora(mlp(), {"r": 4})
    from peft import IA3Config

    with pytest.raises(ValueError, match=r"peft_type: got .*IA3"):
        lk.apply_lora(llama(), IA3Config(target_modules=["q_proj"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["nf4", "fp4"])
def test_a_4_bit_base(dtype, fmt):
    model, adapted = llama(dtype), llama(dtype)
    names = []
    report = lk.quantize_model(
        model, fmt, block_size=32, double_quant=False, progress=lambda *a: names.append(a)
    )
    lk.apply_lora(adapted, r=2, quantize=fmt, block_size=32, double_quant=False)
    assert len(report.quantized) == LLAMA_LAYERS == len(names) - 1
    assert report.bytes_after < report.bytes_before and not list(adapter_layers(model))
    assert not hasattr(model, "lora_config")
    with lk.disable_adapters(adapted):
        assert torch.equal(logits(model), logits(adapted))
    assert type(model.lm_head) is nn.Linear
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.quant_type, weight.block_size, weight.is_nested) == (fmt, 32, False)
    wake_up = lk.apply_lora(model, r=2)  # adapters over what is in 4 bits already
    assert len(wake_up.modules) == LLAMA_LAYERS and not wake_up.quantized


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="model: ReLU has no dense linear layer to quantise"):
        lk.quantize_model(nn.ReLU())
    with pytest.raises(ValueError, match="has adapters on 2 layers already"):
        model = mlp()
        lk.apply_lora(model, r=2, target_modules=["up", "down"])
        lk.quantize_model(model)
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"down: weight"):
        lk.quantize_model(model)
    assert type(model.up) is nn.Linear
    with pytest.raises(ValueError, match="quantize: got 'int8'"):
        lk.quantize_model(mlp(), "int8")
    with pytest.raises(ValueError, match="quantize: got"):
        lk.quantize_model(mlp(), None)
    lk.quantize_model(model, exclude_modules=["down"])
    assert type(model.down) is nn.Linear and type(model.up) is NF4Linear
    with pytest.raises(ValueError, match="has no dense linear layer to quantise"):
        lk.quantize_model(model, exclude_modules=["down"])


def test_a_new_head_stays_dense():
    from tests.adapters import heads

    model = heads.make("roberta sequence")
    report = lk.quantize_model(model)
    assert report.quantized and type(model.classifier.dense) is nn.Linear


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_taking_adapters_off(quantize, dora, merged, tied):
    base, model = (llama(torch.bfloat16, tie_word_embeddings=tied) for _ in range(2))
    if quantize:
        lk.quantize_model(base, quantize)
    weights = {id(p) for p in model.parameters()}
    targets = {"target_modules": ["q_proj", "up_proj", "lm_head"], "exclude_modules": []}
    lk.apply_lora(
        model, r=2, use_dora=dora, **targets if quantize is None else {}, quantize=quantize
    )
    wake(model)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: seen.append(1))
    if merged:
        lk.merge_adapters(model)
    assert lk.unload(model) is model
    assert torch.equal(logits(model), logits(base)) and seen
    assert not any(isinstance(m, LoRALinear | QLoRALinear) for m in model.modules())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in model.parameters())
    if quantize is None:
        assert {id(p) for p in model.parameters()} == weights  # nothing was copied
    lk.apply_lora(model, r=2, quantize=quantize)  # and on again
    with pytest.raises(ValueError, match="has no adapters"):
        lk.unload(llama())


def test_taking_adapters_off_a_compiled_model():
    model = llama()
    lk.apply_lora(model, r=2)
    compiled = torch.compile(wake(model), backend="eager")
    assert lk.unload(compiled) is model
    assert torch.equal(logits(model), logits(llama())) and tokens().shape == (2, 9)
