"""Every option of PEFT's LoraConfig on every kind of layer: accelerated as the table says, and with
PEFT's results."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

from lora_kernels.integrations.peft import accelerate
from lora_kernels.integrations.peft.coverage import (
    PLACES,
    RECORDS,
    REFUSED,
    STARTS,
    TRIED,
    YES,
    Option,
    table,
)
from tests.integrations.peft_models import BASES, K, adapted, base_layer, both, forward, inputs

DOCS = Path(__file__).resolve().parents[2] / "docs" / "peft.md"


def test_every_option_is_classified_once():
    tried = {option.name for option in TRIED}
    others = [*PLACES, *STARTS, *RECORDS]
    assert len(others) == len(set(others)) and not tried & set(others)
    assert tried | set(others) == {field.name for field in dataclasses.fields(LoraConfig)}


def test_the_table_in_the_documentation_is_this_one():
    assert table() in DOCS.read_text(encoding="utf-8")


def value_of(option: Option) -> object:
    """Text that names one of PEFT's classes is made an object."""
    if isinstance(option.value, str) and "(" in option.value:
        value = eval(option.value, vars(peft) | vars(peft.tuners.lora.config))
        if option.name == "arrow_config":
            value.task_adapter_names = ["default"]  # as create_arrow_model does
        return value
    return option.value


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("option", TRIED, ids=lambda o: f"{o.name}={o.shown}")
def test_an_option_runs_where_the_table_says(option, kind):
    outcome = dict(zip(BASES, (option.linear, option.four_bit, option.conv1d), strict=True))[kind]
    options = {option.name: value_of(option)} | option.extra

    def make():
        return adapted(base_layer(kind), **options)

    if outcome == REFUSED:
        with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError)):
            make()
        return
    model = make()
    [row] = accelerate(model).rows
    assert (row.reason or YES) == outcome
    if outcome == YES:
        both(model.eval(), forward(inputs(3, 5, K)))


@pytest.mark.parametrize(
    ("layer", "kind", "why"),
    [
        (nn.Embedding(K, 8), "lora.Embedding", "a look-up, which PEFT does as fast"),
        (nn.Conv1d(4, 6, 3), "lora.Conv1d", "no kernel for convolutions"),
        (nn.Conv2d(4, 6, 1), "lora.Conv2d", "no kernel for convolutions"),
        (nn.Conv3d(4, 6, 1), "lora.Conv3d", "no kernel for convolutions"),
        (
            nn.MultiheadAttention(8, 2),
            "lora.MultiheadAttention",
            "torch takes whole weights here: PEFT merges them at each call",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("lora.") else "",
)
def test_other_layers_are_left_with_the_reason(layer, kind, why):
    rows = accelerate(adapted(layer)).rows
    assert (rows[0].kind, rows[0].reason) == (kind, why)


def test_a_parameter_is_left_with_the_reason():
    model = adapted(nn.Linear(K, 8), target_modules=[], target_parameters=["layer.weight"])
    [row] = accelerate(model).rows
    assert row.kind == "lora.ParamWrapper" and row.reason.startswith("target_parameters")
    with torch.no_grad():
        assert model(inputs(2, K)).shape == (2, 8)
