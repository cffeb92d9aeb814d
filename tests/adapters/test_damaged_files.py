"""load_adapter on files that are damaged, do not fit the model, or are of PEFT's older kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapters import adapter_layers, apply_lora, load_adapter
from tests.adapters.models import CONFIG, WEIGHTS, factors, mlp, save_mlp, wake


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_mlp(tmp_path / "adapter")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


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
