"""Whatever is wrong with an adapter is named, and the pool stays as it was, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_kernels.adapters import LoRAConfig, apply_lora, save_adapter
from lora_kernels.integrations.peft import key_of
from lora_kernels.serving import AdapterPool
from lora_kernels.serving.state import read_state
from tests.adapters.models import llama, mlp
from tests.serving.adapters import (
    adapter,
    assert_serves,
    assert_unchanged,
    make_pool,
    save,
    snapshot,
)

A, B = key_of("up", "A"), key_of("up", "B")


def changed(key: str, value) -> dict:
    state = adapter(1)[0]
    state[key] = value(state.get(key))
    return state


def without(*keys: str) -> dict:
    return {k: t for k, t in adapter(1)[0].items() if k not in keys}


def value_at(index, value):
    def change(t):
        t = t.clone()
        t[index] = value
        return t

    return change


# what the message has to hold: the state, the configuration's changes
BAD_STATES = {
    rf"{A}: got rank 41, expected max_rank=40": adapter(1, ranks={"up": 41}),
    rf"{A}: got shape \[3, 21\], expected \[3, 20\]": (
        changed(A, lambda t: torch.zeros(3, 21)),
        {},
    ),
    rf"{B}: got shape \[32, 3\], expected \[33, 3\]": (changed(B, lambda t: t[:32]), {}),
    rf"{A}: got shape \[60\], expected 2 dim": (changed(A, lambda t: t.flatten()), {}),
    "up: lora_A has rank 2 and lora_B 3": (changed(A, lambda t: t[:2]), {}),
    "up: lora_A has rank 3 and lora_B 3, but the configuration says r=4": (
        adapter(1)[0],
        {"rank_pattern": {"up": 4}},
    ),
    rf"{A}: holds non-finite": (changed(A, value_at((2, 19), float("nan"))), {}),
    rf"{B}: holds non-finite": (changed(B, value_at((0, 0), float("-inf"))), {}),
    rf"{A}: got dtype int32": (changed(A, lambda t: t.int()), {}),
    rf"{B}: got dtype float8_e4m3fn": (changed(B, lambda t: t.to(torch.float8_e4m3fn)), {}),
    rf"{A}: is on the meta device": (changed(A, lambda t: t.to("meta")), {}),
    rf"'{A}': got list, expected a name and its tensor": (changed(A, lambda t: [1.0]), {}),
    rf"{A}: is missing": (without(A), {}),
    rf"{A}, {B}: missing, target_modules is": (without(A, B), {}),
    r"base_model.model.other.lora_A.weight: the pool has no such module, expected some of up": (
        adapter(1)[0]
        | {key_of("other", "A"): torch.ones(3, 4), key_of("other", "B"): torch.ones(4, 3)},
        {},
    ),
    r"base_model.model.up.lora_A.weight: not expected, target_modules is \('down',\)": (
        adapter(1)[0],
        {"target_modules": ["down"]},
    ),
    "base_model.model.up.lora_B.bias: not supported": (
        adapter(1)[0] | {"base_model.model.up.lora_B.bias": torch.ones(33)},
        {},
    ),
    "base_model.model.head.weight: not supported": (
        adapter(1)[0] | {"base_model.model.head.weight": torch.ones(3, 3)},
        {},
    ),
    "base_model.model.up.lora_magnitude_vector: not supported": (
        changed(key_of("up", "magnitude_vector"), lambda t: torch.ones(33)),
        {},
    ),
    "holds no adapter": ({}, {}),
    "use_dora: got True": (adapter(1)[0], {"use_dora": True}),
    "bias: got 'all'": (adapter(1)[0], {"bias": "all"}),
    "lora_bias: got True": (adapter(1)[0], {"lora_bias": True}),
    r"modules_to_save: got \['up'\]": (adapter(1)[0], {"modules_to_save": ["up"]}),
    "fan_in_fan_out: got True": (adapter(1)[0], {"fan_in_fan_out": True}),
    "init_lora_weights: got 'pissa'": (adapter(1)[0], {"init_lora_weights": "pissa"}),
    "use_magic: not known": (adapter(1)[0], {"use_magic": 1}),
    "peft_type: got 'IA3'": (adapter(1)[0], {"peft_type": "IA3"}),
    "target_modules: missing": (adapter(1)[0], {"target_modules": None}),
    "r: got 0": (adapter(1)[0], {"r": 0}),
    "alpha: got nan": (adapter(1)[0], {"lora_alpha": float("nan")}),
    "up: got scale 1e": (adapter(1)[0], {"lora_alpha": 3e300}),
}


def test_names_that_no_module_has_are_passed_over():
    """As PEFT does: `all the tensors are there` is what counts."""
    state, config = adapter(1)
    pool = make_pool()
    pool.load("a", state, config | {"target_modules": ["up", "down", "q_proj"]})
    assert_serves(pool, "a", state)


@pytest.mark.parametrize("message", BAD_STATES)
@pytest.mark.parametrize("call", ["load", "replace"])
def test_a_bad_adapter_is_named_and_changes_nothing(message, call):
    state, config = BAD_STATES[message]
    pool = make_pool()
    pool.load("old", *adapter(0))
    before = snapshot(pool)
    name = {"load": "new", "replace": "old"}[call]
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(pool, call)(name, state, adapter(1)[1] | config)
    assert_unchanged(pool, before)
    assert_serves(pool, "old", adapter(0)[0])


def test_what_overflows_the_pools_dtype_is_refused():
    pool = make_pool(dtype=torch.float16)
    with pytest.raises(ValueError, match=rf"{B}: overflows the pool's float16"):
        pool.load("a", changed(B, value_at((5, 1), 1e5)), adapter(1)[1])
    assert pool.stats().pages_used == 0 and pool.stats().known == 0


@pytest.mark.parametrize("config", [None, 3, "config"])
def test_a_state_dict_needs_a_configuration(config):
    with pytest.raises(TypeError, match=r"config: got .*expected the state dict's PEFT"):
        make_pool().load("a", adapter(0)[0], config)


def damage_config(folder):
    (folder / "adapter_config.json").write_text("{")


def damage_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def unlink(name):
    return lambda folder: (folder / name).unlink()


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


BAD_FOLDERS = {
    "adapter_config.json: no such file": unlink("adapter_config.json"),
    "adapter_config.json: is not JSON": damage_config,
    "adapter_model.safetensors: no such file": unlink("adapter_model.safetensors"),
    "adapter_model.bin: is damaged, or holds more than tensors": pickled,
    "adapter_model.safetensors: is damaged": damage_weights,
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_a_bad_directory_is_named_and_changes_nothing(message, tmp_path):
    folder = save(tmp_path, *adapter(1))
    BAD_FOLDERS[message](folder)
    pool = make_pool()
    pool.load("old", *adapter(0))
    before = snapshot(pool)
    for call, name in ((pool.load, "new"), (pool.replace, "old")):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            call(name, folder)
    assert_unchanged(pool, before)


def test_errors_name_the_file(tmp_path):
    state, config = adapter(1, use_dora=True)
    folder = save(tmp_path / "dora", state, config)
    with pytest.raises(ValueError, match=r"dora/adapter_config.json: use_dora: got True"):
        make_pool().load("a", folder)
    folder = save(tmp_path / "nan", changed(A, value_at(0, float("inf"))), adapter(1)[1])
    with pytest.raises(ValueError, match=r"nan/adapter_model.safetensors: .*non-finite"):
        make_pool().load("a", folder)
    with pytest.raises(ValueError, match="config: was given beside a directory"):
        make_pool().load("a", folder, config)


@pytest.mark.parametrize("kind", ["dict", "ours", "peft"])
def test_configurations_of_all_kinds(kind):
    state, config = adapter(1, ranks={"up": 20})
    options = {"r": 3, "target_modules": ["up", "down"], "rank_pattern": {"up": 20}}
    given = {
        "dict": config,
        "ours": LoRAConfig(alpha=6, **options),
        "peft": LoraConfig(lora_alpha=6, **options),
    }[kind]
    pool = make_pool()
    pool.load("a", state, given)
    assert_serves(pool, "a", state)


def test_selected_layers(tmp_path):
    peft = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1])
    )
    peft.save_pretrained(tmp_path)
    pool = AdapterPool(llama(), slots=1, pages=1)
    slot = pool.load("a", tmp_path)
    ranks = {name: int(pool.pages(name).ranks[slot]) for name in pool.modules}
    assert {n for n, r in ranks.items() if r} == {"model.layers.1.self_attn.q_proj"}


def test_excluded_layers(tmp_path):
    peft = get_peft_model(
        llama(), LoraConfig(r=4, target_modules="all-linear", exclude_modules=["up_proj"])
    )
    peft.save_pretrained(tmp_path)
    pool = AdapterPool(llama(), slots=1, pages=1)
    slot = pool.load("a", tmp_path)
    assert int(pool.pages("model.layers.0.mlp.up_proj").ranks[slot]) == 0
    assert pool.stats().pages_used == 12


def test_all_linear_wants_every_layer(tmp_path):
    model = mlp()
    apply_lora(model, r=2, exclude_modules=())
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": "all-linear"}))
    pool = AdapterPool(mlp(), slots=1, pages=1)
    pool.load("whole", tmp_path)
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({k: t for k, t in state.items() if "down" not in k}, weights)
    with pytest.raises(ValueError, match=f"{key_of('down', 'A')}.*missing"):
        pool.replace("whole", tmp_path)


def test_a_state_dict_that_trains_is_copied_without_its_graph():
    state, config = adapter(1)
    parameters = {key: torch.nn.Parameter(t) for key, t in state.items()}
    read = read_state(parameters, config, make_pool().spec)
    for factors in read.factors.values():
        assert not factors.a.requires_grad and not factors.b.requires_grad
    pool = make_pool()
    pool.load("a", parameters, config)
    assert_serves(pool, "a", state)
