"""save_adapter and load_adapter: round trips, interruptions, damaged files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from tests.adapters.models import llama, logits, mlp, wake

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of rank 2 (down: 3) on `mlp`."""
    model = mlp()
    apply_lora(model, r=2, alpha=6, rank_pattern={"down": 3}, target_modules=["up", "down"])
    return save_adapter(wake(model), tmp_path / "adapter")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


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


def _truncate(folder: Path, keep: float) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _set(key: str, value: torch.Tensor | None):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value

    return change


A, B = "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight"
DAMAGES = {
    "truncated": (lambda f: _truncate(f, 0.7), ValueError, "is damaged or no safetensors file"),
    "truncated header": (lambda f: _truncate(f, 0.01), ValueError, "is damaged or no safetensors"),
    "empty": (lambda f: _truncate(f, 0), ValueError, "is damaged or no safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), ValueError, "is not JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "holds a list"),
    "another method": (
        lambda f: edit_config(f, peft_type="IA3"),
        ValueError,
        "peft_type: got 'IA3'",
    ),
    "no rank": (lambda f: edit_config(f, r=None), ValueError, "r: missing"),
    "rank 0": (lambda f: edit_config(f, r=0), ValueError, "r: got 0"),
    "rank as text": (lambda f: edit_config(f, r="2"), TypeError, "r: got '2'"),
    "another rank": (lambda f: edit_config(f, r=8), ValueError, "up: lora_A has rank 2.*says r=8"),
    "another pattern": (
        lambda f: edit_config(f, rank_pattern={}),
        ValueError,
        "down: lora_A has rank 3.*says r=2",
    ),
    "more targets": (
        lambda f: edit_config(f, target_modules=["up", "down", "head"]),
        ValueError,
        "2 tensors missing from .*head.lora_A",
    ),
    "fewer targets": (
        lambda f: edit_config(f, target_modules=["up"]),
        ValueError,
        "2 tensors not expected in .*down.lora_A",
    ),
    "unknown targets": (
        lambda f: edit_config(f, target_modules=["left"]),
        ValueError,
        "'left'.*Candidates: down, head, up",
    ),
    "a factor missing": (
        lambda f: edit_weights(f, _set(B, None)),
        ValueError,
        f"{B}: is missing",
    ),
    "another tensor": (
        lambda f: edit_weights(f, _set("base_model.model.up.lora_magnitude_vector", torch.ones(2))),
        ValueError,
        "1 tensors not expected in .*lora_magnitude_vector",
    ),
    "three dimensions": (
        lambda f: edit_weights(f, _set(A, torch.ones(2, 64, 1))),
        ValueError,
        r"got shape \[2, 64, 1\]",
    ),
    "another width": (
        lambda f: edit_weights(f, _set(A, torch.ones(2, 65))),
        ValueError,
        "up: the adapter is for a layer with in_features=65.*has 64, 96",
    ),
    "integers": (
        lambda f: edit_weights(f, _set(A, torch.ones(2, 64, dtype=torch.int8))),
        TypeError,
        "got dtype int8",
    ),
    "not finite": (
        lambda f: edit_weights(f, _set(A, torch.full((2, 64), float("nan")))),
        ValueError,
        f"{A}: holds non-finite values",
    ),
    "unequal ranks": (
        lambda f: edit_weights(f, _set(B, torch.ones(96, 4))),
        ValueError,
        "lora_A has rank 2 and lora_B 4",
    ),
    "DoRA without magnitudes": (
        lambda f: edit_config(f, use_dora=True),
        ValueError,
        "2 tensors missing from .*down.lora_magnitude_vector, .*up.lora_magnitude_vector",
    ),
    "a trained bias": (lambda f: edit_config(f, bias="all"), ValueError, "bias: got 'all'"),
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), ValueError, "lora_bias: got True"),
    "transposed": (
        lambda f: edit_config(f, fan_in_fan_out=True),
        ValueError,
        "fan_in_fan_out: got True",
    ),
    "saved modules": (
        lambda f: edit_config(f, modules_to_save=["head"]),
        ValueError,
        r"2 tensors missing from .*: base_model.model.head.weight, base_model.model.head.bias",
    ),
    "changed base": (
        lambda f: edit_config(f, init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights: got 'pissa'",
    ),
    "an unknown option": (
        lambda f: edit_config(f, use_magic=True),
        ValueError,
        "use_magic: not known here",
    ),
}


# A model with adapters says itself where they are, whatever the file's targets.
CASES = [(d, adapted) for d in DAMAGES for adapted in (False, True)]
CASES.remove(("unknown targets", True))


@pytest.mark.parametrize(("damage", "adapted"), CASES)
def test_damaged_files_change_nothing(saved, damage, adapted):
    spoil, error, match = DAMAGES[damage]
    model = mlp()
    if adapted:
        targets = ["up", "down", "head"] if damage == "more targets" else ["up", "down"]
        targets = ["up"] if damage == "fewer targets" else targets
        ranks = {"down": 3} if "down" in targets else {}
        apply_lora(model, r=2, rank_pattern=ranks, target_modules=targets)
        before = factors(wake(model))
    spoil(saved)
    with pytest.raises(error, match=match):
        load_adapter(model, saved)
    if adapted:
        assert all(torch.equal(v, before[k]) for k, v in factors(model).items())
        assert model.up.alpha == 32
    else:
        assert not list(adapter_layers(model)) and not hasattr(model, "lora_config")


def test_not_strict(saved):
    edit_config(saved, use_magic=True, target_modules=["up", "down", "head"])
    edit_weights(saved, _set("base_model.model.gone.lora_A.weight", torch.ones(2, 4)))
    edit_weights(saved, _set("base_model.model.gone.lora_B.weight", torch.ones(4, 2)))
    model = mlp()
    with pytest.warns(UserWarning) as warned:
        result = load_adapter(model, saved, strict=False)
    text = " ".join(str(w.message) for w in warned)
    assert "use_magic" in text and "gone.lora_A" in text
    assert set(result.modules) == {"up", "down"} == {n for n, _ in adapter_layers(model)}
    assert len(result.unexpected_keys) == 2
    model = mlp()
    apply_lora(model, r=2, rank_pattern={"down": 3})
    with pytest.warns(UserWarning):
        result = load_adapter(model, saved, strict=False)
    assert len(result.missing_keys) == 2 and "head" in result.missing_keys[0]


def test_the_models_own_ranks_must_fit(saved):
    model = mlp()
    apply_lora(model, r=8, target_modules=["up", "down"])
    with pytest.raises(ValueError, match="down: the adapter has rank 3, the model's has r=8"):
        load_adapter(model, saved)
    model = mlp()
    apply_lora(model, r=2, rank_pattern={"down": 3}, target_modules=["up", "down"])
    with pytest.raises(ValueError, match="quantize: got 'nf4', but the model has adapters"):
        load_adapter(model, saved, quantize="nf4")
    model.half()
    edit_weights(saved, _set(A, torch.full((2, 64), 1e6)))
    with pytest.raises(ValueError, match="up: the adapter overflows the model's float16"):
        load_adapter(model, saved)


def test_a_pickled_adapter(saved):
    """PEFT's older file, which it still writes with safe_serialization=False."""
    expected, other = mlp().eval(), mlp().eval()
    load_adapter(expected, saved)
    torch.save(load_file(saved / WEIGHTS), saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    load_adapter(other, saved)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), expected(x))
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Path("a")))
    with pytest.raises(ValueError, match=r"adapter_model.bin: is damaged, or holds more than"):
        load_adapter(mlp(), saved)
    torch.save([torch.ones(2)], saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin: holds list, expected names"):
        load_adapter(mlp(), saved)


def test_16_bit_adapters(tmp_path):
    model = llama(torch.bfloat16)
    apply_lora(model, r=4, adapter_dtype=torch.bfloat16)
    save_adapter(wake(model), tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    other = llama(torch.bfloat16)
    load_adapter(other, tmp_path)
    for (_, a), (_, b) in zip(adapter_layers(model), adapter_layers(other), strict=True):
        assert torch.equal(a.lora_B.float(), b.lora_B)
