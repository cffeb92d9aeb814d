"""Batches whose rows each use their own adapter, on an accelerated model of PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from lora_kernels import functional
from lora_kernels.integrations.peft import accelerate, adapter_rows
from lora_kernels.integrations.peft.mixed import RowNames
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import VOCABULARY, llama
from tests.integrations.peft_models import (
    BASES,
    K,
    adapted,
    base_layer,
    both,
    exact,
    in_four_bit,
    inputs,
    layers,
    peft_llama,
    wake,
)

ROWS = ["second", "__base__", "default", "third", "second"]
BATCHES = {
    "all": ROWS,
    "one adapter": ["default"] * 5,
    "base alone": ["__base__"] * 5,
    "not on this layer": ["elsewhere", "default", "elsewhere", "second", "default"],
}


def with_adapters(model: Any, **options: Any) -> Any:
    """Two more adapters, of other ranks; a fourth that is not on the layer."""
    for i, (name, r) in enumerate({"second": 3, "third": 17}.items()):
        model.add_adapter(name, LoraConfig(r=r, target_modules=model.targets, **options))
        wake(model, seed=20 + i)
    return model


def net(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = adapted(base_layer(kind, dtype), **options)
    model.targets = ["layer"]
    return with_adapters(model, **options).eval()


def call(names: list[str], x: Tensor) -> Any:
    def run(model: Any) -> dict[str, Tensor]:
        wide = next(model.parameters()).dtype == torch.float64
        return {"y": layers(model)[0](x.double() if wide else x, adapter_names=names)}

    return run


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("kind", BASES)
def test_rows_of_a_layer(kind, names, monkeypatch):
    """In two and three dimensions, with gradients and without."""
    made = []
    gather = functional.gather_lora
    monkeypatch.setattr(
        functional, "gather_lora", lambda *a, **k: made.append(a) or gather(*a, **k)
    )
    model = net(kind)
    for shape in ((5, K), (5, 7, K)):
        both(model, call(names, inputs(*shape)))
        with torch.no_grad():
            both(model, call(names, inputs(*shape)))
    assert bool(made) == any(name in ("default", "second", "third") for name in names)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_rows_of_a_layer_in_bf16(adapter):
    model = net("Linear", torch.bfloat16)
    layers(model)[0].lora_A.to(adapter)
    layers(model)[0].lora_B.to(adapter)
    x = inputs(5, 3, K, dtype=torch.bfloat16)
    with torch.no_grad():
        both(model, call(ROWS, x), torch.bfloat16)
    both(model, call(ROWS, x), torch.bfloat16)


def test_what_has_no_kernel_goes_to_peft(monkeypatch):
    monkeypatch.delattr(functional, "gather_lora")
    model = net("Linear", lora_bias=True)
    both(model, call(ROWS, inputs(5, K)))


def generated(model: Any, names: list[str], beams: int) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (5, 4), generator=torch.Generator().manual_seed(1))
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        max_new_tokens=6,
        do_sample=False,
        num_beams=beams,
        pad_token_id=0,
    )


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "4-bit"])
def test_generate_gives_pefts_tokens(kind, beams):
    base = llama() if kind == "dense" else in_four_bit(llama())
    model = peft_llama(base=base, task_type="CAUSAL_LM")
    model.targets = "all-linear"
    with_adapters(model).eval()
    theirs = generated(exact(model), ROWS, beams)
    assert accelerate(model).left == ()
    assert torch.equal(generated(model, ROWS, beams), theirs)


CHANGES = {
    "in place": lambda layer: layer.lora_B["second"].weight.mul_(2),
    "another storage": lambda layer: setattr(
        layer.lora_B["second"].weight, "data", layer.lora_B["second"].weight.data * 2
    ),
    "another parameter": lambda layer: setattr(
        layer.lora_A["second"], "weight", torch.nn.Parameter(layer.lora_A["second"].weight * 2)
    ),
    "scale": lambda layer: layer.set_scale("second", 2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_a_call_keeps_is_dropped_once_an_adapter_changes(change):
    model = net("Linear")
    accelerate(model)
    [layer] = layers(model)
    x, names = inputs(5, K), RowNames(ROWS)
    before = layer(x, adapter_names=names)
    assert list(names.kept) == [layer]
    assert torch.equal(layer(x, adapter_names=names), before)
    change(layer)
    after = layer(x, adapter_names=names)
    assert torch.equal(after, layer(x, adapter_names=ROWS)) and not torch.equal(after, before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_train_as_each_adapter_does_alone(checkpointing):
    names = ["default", "second", "__base__", "second"]
    ids = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1))

    def make() -> Any:
        model = peft_llama(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model.targets = ["q_proj", "down_proj"]
        with_adapters(model)
        model.base_model.set_adapter(["default", "second"])
        return model.train()

    def loss(logits: Tensor) -> Tensor:
        return logits.double().square().mean(dim=(1, 2)).sum()

    ours = make()
    accelerate(ours)
    if checkpointing:
        ours.gradient_checkpointing_enable()
        ours.enable_input_require_grads()
    with adapter_rows(ours, names):
        loss(ours(input_ids=ids).logits).backward()
    results = []
    for model in (make(), exact(make())):
        for name in ("default", "second"):
            model.set_adapter(name)
            model.base_model.set_adapter([name])
            rows = [i for i, n in enumerate(names) if n == name]
            loss(model(input_ids=ids[rows]).logits).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, oracle = results
    got = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert got.keys() == plain.keys() and len(got) == 16
    for name, grad in got.items():
        assert_within_budget(grad, oracle[name], plain[name], name)


def test_rows_are_pefts_outside_the_block():
    model = net("Linear")
    accelerate(model)
    x = inputs(5, K)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        adapter_rows(model, ["nobody"] * 5).__enter__()
    with adapter_rows(model.train(), ROWS):
        assert model.base_model.training
        inside = model(x)
    assert torch.equal(inside, layers(model)[0](x, adapter_names=ROWS))
    assert not torch.equal(model(x), inside)


def test_dropout_of_rows():
    """Each adapter drops with its own probability; rows without an adapter drop nothing."""
    model = net("Linear", lora_dropout=0.5)
    accelerate(model)
    [layer] = layers(model)
    layer.train()
    layer.lora_dropout["third"].p = 0.0
    x = inputs(5, 400, K)
    base = layer.base_layer(x)
    torch.manual_seed(5)
    dropped = layer(x, adapter_names=ROWS) - base
    torch.manual_seed(5)  # a seed for each adapter, in the order of the rows
    seeds = torch.randint(0, 2**63 - 1, (3,), dtype=torch.int64)
    kept = functional.dropout_mask([400, K], 0.5, seeds[1:2])
    for name, row, seen in (("default", 2, x[2] * kept * 2), ("third", 3, x[3])):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        wide = [t.double() for t in (seen, a, b)]
        want = wide[0] @ wide[1].T @ wide[2].T * layer.scaling[name]
        plain = (base[row] + seen @ a.T @ b.T * layer.scaling[name]) - base[row]
        assert_within_budget(dropped[row], want, plain, name)
    assert not dropped[1].any()
