"""DoRA on whole models: apply_lora, checkpoints, merging, reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels import explain
from lora_kernels.adapters import (
    LoRAConfig,
    adapter_layers,
    apply_lora,
    disable_adapters,
    load_adapter,
    merge_adapters,
    merge_and_unload,
    model_report,
    save_adapter,
    unmerge_adapters,
)
from lora_kernels.nn import LoRALinear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import (
    assert_training_moves_trainable_only,
    llama,
    logits,
    mlp,
    tokens,
    wake,
)

WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.up.lora_magnitude_vector"
quantizations = pytest.mark.parametrize("quantize", [None, "nf4"])


def move(model):
    """Give every adapter a B and a magnitude that training might have reached."""
    generator = torch.Generator().manual_seed(5)
    for _, layer in adapter_layers(wake(model)):
        with torch.no_grad():
            n = layer.out_features
            layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn(n, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = mlp()
    apply_lora(model, r=2, alpha=6, target_modules=["up", "down"], use_dora=True)
    return save_adapter(move(model), tmp_path / "adapter")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@quantizations
def test_apply(quantize):
    model = llama(torch.bfloat16)
    before = logits(model)
    report = apply_lora(model, r=4, use_dora=True, quantize=quantize)
    layers = dict(adapter_layers(model))
    assert all(m.use_dora and m.lora_magnitude_vector.requires_grad for m in layers.values())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert trainable == {f"{m}.{kind}" for m in layers for kind in kinds}
    assert model.lora_config == LoRAConfig(r=4, use_dora=True)
    assert "DoRA" in str(report) and "adapter" in str(report).splitlines()[1]
    if quantize is None:
        plain = llama(torch.bfloat16)
        assert_within_budget(logits(model), logits(plain.double()), before)


@quantizations
def test_training_moves_the_magnitudes(quantize):
    model = llama().train()
    apply_lora(model, r=4, dropout=0.1, use_dora=True, quantize=quantize)
    assert_training_moves_trainable_only(model, steps=6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = llama().train()
        torch.manual_seed(4)
        apply_lora(model, r=4, dropout=0.2, use_dora=True)
        move(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in grads[0].items():
        assert torch.equal(gradient, grads[1][name]), name


@quantizations
def test_round_trip_into_a_plain_model(tmp_path, quantize):
    model = llama(torch.bfloat16)
    apply_lora(model, r=4, use_dora=True, quantize=quantize, rank_pattern={"q_proj": 2})
    expected = logits(move(model))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    other = llama(torch.bfloat16)
    result = load_adapter(other, tmp_path, quantize=quantize)
    assert torch.equal(logits(other), expected)
    assert result.missing_keys == result.unexpected_keys == ()
    assert all(layer.use_dora for _, layer in adapter_layers(other))


def test_what_is_saved(saved):
    shapes = {k: list(v.shape) for k, v in load_file(saved / WEIGHTS).items()}
    assert shapes == {
        "base_model.model.up.lora_A.weight": [2, 64],
        "base_model.model.up.lora_B.weight": [96, 2],
        "base_model.model.up.lora_magnitude_vector": [96],
        "base_model.model.down.lora_A.weight": [2, 96],
        "base_model.model.down.lora_B.weight": [64, 2],
        "base_model.model.down.lora_magnitude_vector": [64],
    }


def test_loading_into_dora_layers_merges_anew(saved):
    model = mlp()
    apply_lora(model, r=2, target_modules=["up", "down"], use_dora=True)
    merge_adapters(model)
    load_adapter(model, saved)
    other = mlp()
    load_adapter(other, saved)
    merge_adapters(other)
    assert torch.equal(model.up._merged_weight, other.up._merged_weight)


@pytest.mark.parametrize("layers", [False, True])
def test_the_kind_of_adapter_must_be_the_same(saved, tmp_path, layers):
    """A file of DoRA into LoRA layers, and the other way round."""
    model, folder = mlp(), saved
    if layers:
        plain = mlp()
        apply_lora(plain, r=2, target_modules=["up", "down"])
        folder = save_adapter(wake(plain), tmp_path / "plain")
    apply_lora(model, r=2, target_modules=["up", "down"], use_dora=layers)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"use_dora={not layers}, .*use_dora={layers}"):
        load_adapter(model, folder)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def _put(key, value):
    def change(tensors):
        tensors[key] = value

    return change


BAD = {
    "shape": (_put(KEY, torch.ones(95)), ValueError, rf"{KEY}: got shape \[95\], expected \[96\]"),
    "dims": (_put(KEY, torch.ones(96, 1)), ValueError, "expected 1 dimension"),
    "nan": (_put(KEY, torch.full((96,), float("nan"))), ValueError, "holds non-finite values"),
    "dtype": (_put(KEY, torch.ones(96, dtype=torch.int8)), TypeError, "got dtype int8"),
    "missing": (lambda t: t.pop(KEY), ValueError, f"1 tensors missing from .*{KEY}"),
    "no A": (
        lambda t: t.pop("base_model.model.up.lora_A.weight"),
        ValueError,
        "up.lora_A.weight: is missing",
    ),
}


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("adapted", [False, True])
def test_damaged_files(saved, damage, adapted):
    change, error, match = BAD[damage]
    edit(saved, change)
    model = mlp()
    if adapted:
        apply_lora(model, r=2, target_modules=["up", "down"], use_dora=True)
    with pytest.raises(error, match=match):
        load_adapter(model, saved)
    assert adapted == any(True for _ in adapter_layers(model))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_missing_magnitude_becomes_the_norm(saved, adapted):
    edit(saved, lambda t: t.pop(KEY))
    model = mlp()
    if adapted:
        apply_lora(model, r=2, target_modules=["up", "down"], use_dora=True)
    with pytest.warns(UserWarning, match="lora_magnitude_vector"):
        result = load_adapter(model, saved, strict=False)
    assert result.missing_keys == (KEY,)
    total = model.up.weight + model.up.delta_weight()
    assert model.up.lora_B.any()
    assert_within_budget(
        model.up.lora_magnitude_vector.detach(),
        torch.linalg.vector_norm(total.detach().double(), dim=1),
        torch.linalg.vector_norm(total.detach(), dim=1),
    )


def test_layers_of_both_kinds_cannot_be_saved_together(tmp_path):
    model = mlp()
    apply_lora(model, r=2, dropout=0, target_modules=["up"], use_dora=True)
    model.down = LoRALinear.from_linear(model.down, r=2)
    with pytest.raises(ValueError, match=r"use_dora: the layers have \[False, True\]"):
        save_adapter(model, tmp_path)


@quantizations
def test_merging(quantize):
    model = llama()
    apply_lora(model, r=4, use_dora=True, quantize=quantize)
    expected = logits(move(model))
    with disable_adapters(model):
        assert not torch.equal(logits(model), expected)
    merge_adapters(model)
    merged = logits(model)
    unmerge_adapters(model)
    assert torch.equal(logits(model), expected)
    merge_and_unload(model)
    assert torch.equal(logits(model), merged)
    assert not list(adapter_layers(model))


@quantizations
def test_the_report(quantize):
    model = mlp()
    apply_lora(model, r=2, quantize=quantize, use_dora=True)
    report = model_report(model, rows=18)
    for row in report.layers:
        layer = model.get_submodule(row.name).eval()
        ran = explain(layer, torch.randn(18, layer.in_features))
        assert [e.chosen for e in ran if e.op == "dora_linear_fwd"] == [row.path]
        assert row.use_dora
    assert "adapter" in str(report).splitlines()[0]
    plain = mlp()
    apply_lora(plain, r=2)
    assert "adapter" not in str(model_report(plain)).splitlines()[0]


def test_the_configuration():
    config = LoRAConfig(r=4, use_dora=True)
    assert config.to_peft_dict()["use_dora"] is True
    assert LoRAConfig.from_peft_dict(config.to_peft_dict()) == config
