"""LoRAConfig: checks, patterns, PEFT's dictionary both ways."""

from __future__ import annotations

import pytest

from lora_kernels.adapters import LoRAConfig


def test_round_trip_through_pefts_dictionary():
    config = LoRAConfig(
        r=4,
        alpha=7.5,
        dropout=0.125,
        target_modules=("a", "b"),
        use_rslora=True,
        rank_pattern={"a": 2},
        alpha_pattern={"b": 3},
        exclude_modules=("c",),
        init="gaussian",
    )
    assert LoRAConfig.from_peft_dict(config.to_peft_dict()) == config
    regex = LoRAConfig(target_modules=r".*\.q", exclude_modules=r"x\..*")
    assert LoRAConfig.from_peft_dict(regex.to_peft_dict()) == regex


def test_pefts_defaults():
    config = LoRAConfig.from_peft_dict({"peft_type": "LORA", "r": 8, "target_modules": ["q"]})
    assert (config.alpha, config.dropout, config.exclude_modules) == (8, 0.0, ())


def test_the_dictionary_is_what_peft_writes():
    from peft import LoraConfig

    theirs = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"], lora_dropout=0.1).to_dict()
    ours = LoRAConfig(4, 6, 0.1, ("q", "v"), exclude_modules=()).to_peft_dict()
    for key, value in ours.items():
        assert key in theirs
        if key not in ("target_modules", "inference_mode"):
            assert theirs[key] == value, key


def test_first_pattern_counts():
    config = LoRAConfig(rank_pattern={"x.q": 2, "q": 3}, alpha_pattern={"^x.q": 5})
    assert [config.rank_of(n) for n in ("a.x.q", "a.q", "q", "aq")] == [2, 3, 3, 16]
    assert [config.alpha_of(n) for n in ("a.x.q", "x.q")] == [32, 5]


def test_sets_have_one_order():
    assert LoRAConfig(target_modules={"b", "a"}).target_modules == ("a", "b")


def test_bad_values():
    with pytest.raises(ValueError, match="r: got 0"):
        LoRAConfig(r=0)
    with pytest.raises(TypeError, match="exclude_modules: got 4"):
        LoRAConfig(exclude_modules=4)
    with pytest.raises(TypeError, match="rank_pattern: got 4, expected a string"):
        LoRAConfig(rank_pattern={4: 4})
    with pytest.raises(ValueError, match="target_modules: missing"):
        LoRAConfig.from_peft_dict({"peft_type": "LORA", "r": 4})
