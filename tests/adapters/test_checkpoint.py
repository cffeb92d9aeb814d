"""save_adapter and load_adapter: round trips and interruptions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels.adapters import (
    adapter_layers,
    apply_lora,
    files,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from lora_kernels.nn import LoRALinear
from tests.adapters.models import CONFIG, WEIGHTS, factors, llama, logits, mlp, save_mlp, wake


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_mlp(tmp_path / "adapter")


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_round_trip_into_a_plain_model(tmp_path, quantize, use_rslora):
    model = llama(torch.bfloat16)
    apply_lora(
        model,
        r=4,
        alpha=10,
        dropout=0.25,
        quantize=quantize,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 5},
    )
    expected = logits(wake(model))
    assert save_adapter(model, tmp_path) == tmp_path
    other = llama(torch.bfloat16)
    result = load_adapter(other, tmp_path, quantize=quantize)
    assert torch.equal(logits(other), expected)
    assert set(result.modules) == {n for n, _ in adapter_layers(model)}
    assert result.missing_keys == result.unexpected_keys == ()
    assert all(layer.dropout == 0.25 for _, layer in adapter_layers(other))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(factors(other))


def test_round_trip_into_a_model_with_adapters(tmp_path):
    model = llama()
    apply_lora(model, r=4, alpha=10)
    expected = logits(wake(model))
    save_adapter(model, tmp_path)
    other = llama()
    apply_lora(other, r=4, alpha=99, dropout=0.3, use_rslora=True)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    assert all(layer.dropout == 0.3 for _, layer in adapter_layers(other))


def test_the_format_of_the_base_is_chosen_on_loading(saved):
    model = mlp()
    load_adapter(model, saved, quantize="fp4", block_size=32, double_quant=False)
    weight = model.up.weight
    assert (weight.quant_type, weight.block_size, weight.is_nested) == ("fp4", 32, False)


def test_merged_or_not_makes_no_difference(tmp_path):
    model = llama()
    apply_lora(model, r=4)
    expected = logits(wake(model))
    save_adapter(model, tmp_path / "a")
    merge_adapters(model)
    save_adapter(model, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = llama()
    apply_lora(other, r=4)
    merge_adapters(other)
    load_adapter(other, tmp_path / "a")
    assert all(layer.merged for _, layer in adapter_layers(other))
    merged = logits(other)
    assert torch.equal(merged, logits(model))
    unmerge_adapters(other)
    assert torch.equal(logits(other), expected)


def test_what_is_saved(saved):
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((saved / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert config["target_modules"] == ["down", "up"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 6, {"down": 3})
    shapes = {k: list(v.shape) for k, v in load_file(saved / WEIGHTS).items()}
    assert shapes == {
        "base_model.model.up.lora_A.weight": [2, 64],
        "base_model.model.up.lora_B.weight": [96, 2],
        "base_model.model.down.lora_A.weight": [3, 96],
        "base_model.model.down.lora_B.weight": [64, 3],
    }


def test_saving_replaces_and_leaves_nothing_behind(saved):
    model = mlp()
    load_adapter(model, saved)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_B.fill_(7)
    save_adapter(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    other = mlp()
    load_adapter(other, saved)
    assert (other.up.lora_B == 7).all()


@pytest.mark.parametrize("step", ["save", "flush", "replace"])
def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch, step):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = mlp()
    load_adapter(model, saved)
    with torch.no_grad():
        model.up.lora_B.fill_(7)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    if step == "save":
        monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    elif step == "flush":
        monkeypatch.setattr(files, "flush", interrupt)
    else:
        monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_model_put_together_by_hand_can_be_saved(tmp_path):
    model = mlp()
    model.up = LoRALinear.from_linear(model.up, r=2, alpha=3)
    model.down = LoRALinear.from_linear(model.down, r=5, alpha=3)
    model.head = LoRALinear.from_linear(model.head, r=2, alpha=4)
    save_adapter(wake(model), tmp_path)
    other = mlp()
    load_adapter(other, tmp_path)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))
    model.head.dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout: the layers have \[0.0, 0.5\]"):
        save_adapter(model, tmp_path)


def test_names_that_do_not_tell_layers_apart(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    apply_lora(model, r=2, target_modules="0")
    save_adapter(wake(model), tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert load_adapter(other, tmp_path).modules == ("0",)
    assert isinstance(other[0], LoRALinear) and type(other[1][0]) is nn.Linear


def test_a_compiled_or_wrapped_model_saves_the_same(saved, tmp_path):
    model = mlp()
    load_adapter(model, saved)
    save_adapter(torch.compile(nn.DataParallel(model)), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "wrapped" / name).read_bytes() == (saved / name).read_bytes()
    part = mlp()
    load_adapter(part, saved)
    part.up = torch.compile(part.up)
    save_adapter(part, tmp_path / "part")
    assert (tmp_path / "part" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    load_adapter(torch.compile(part), saved)


def test_without_adapters_there_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(mlp(), tmp_path)
    with torch.device("meta"):
        meta = mlp()
    apply_lora(meta, r=2)
    with pytest.raises(ValueError, match=r"up.lora_A.weight: is on the meta device"):
        save_adapter(meta, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_16_bit_adapters(tmp_path):
    model = llama(torch.bfloat16)
    apply_lora(model, r=4, adapter_dtype=torch.bfloat16)
    save_adapter(wake(model), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    other = llama(torch.bfloat16)
    load_adapter(other, tmp_path)
    for (_, a), (_, b) in zip(adapter_layers(model), adapter_layers(other), strict=True):
        assert torch.equal(a.lora_B.float(), b.lora_B)
