"""Adapters on the embedding, tied to the output layer or not, against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from lora_kernels.nn.multi_lora_embedding import MultiLoRAEmbedding
from lora_kernels.serving import AdapterPool, attach_pool, detach_pool
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama
from tests.serving.peft_rows import assert_rows_are_peft, drawn_peft
from tests.serving.test_model import tokens

NAMES = {"tokens": ["embed_tokens"], "both": ["q_proj", "embed_tokens"], "body": ["q_proj"]}
ROWS = ["both", None, "tokens", "body", "tokens", ""]
TARGETS = ["q_proj", "embed_tokens"]


def folders(root: Path, **config: Any) -> dict[str, Path]:
    made = {}
    for i, (name, targets) in enumerate(NAMES.items()):
        options = LoraConfig(r=3 + 9 * i, lora_alpha=9, target_modules=targets)
        peft = drawn_peft(llama(**config), options, "lora_", seed=i)
        made[name] = root / name
        peft.save_pretrained(made[name])
    return made


def served(model: nn.Module, saved: dict[str, Path]) -> AdapterPool:
    pool = AdapterPool(model, slots=3, pages=4, target_modules=TARGETS)
    for name in pool.modules:
        pool.pages(name).a.fill_(float("nan"))
    for name, folder in saved.items():
        pool.load(name, folder)
    attach_pool(model, pool)
    return pool


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_each_row_has_its_own_embedding(tmp_path, tied):
    saved = folders(tmp_path, tie_word_embeddings=tied)
    model = llama(tie_word_embeddings=tied)
    base = model(tokens(len(ROWS))).logits
    pool = served(model, saved)
    assert isinstance(model.model.embed_tokens, MultiLoRAEmbedding)
    assert pool.modules["model.embed_tokens"] == (100, 64)
    assert torch.equal(model(tokens(len(ROWS))).logits, base)
    with pool.route(ROWS):
        mixed = model(tokens(len(ROWS))).logits
    nobody = [i for i, row in enumerate(ROWS) if not row]
    assert torch.equal(mixed[nobody], base[nobody])
    assert_rows_are_peft(model, saved, ROWS, mixed, base, tie_word_embeddings=tied)
    assert len(detach_pool(model)) == 3
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_gradients_reach_an_embedding_that_trains():
    model = llama()
    pool = AdapterPool(model, slots=1, pages=1, target_modules=["embed_tokens"])
    g = torch.Generator().manual_seed(1)
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    state = {
        f"{key}A": torch.randn(2, 100, generator=g),
        f"{key}B": torch.randn(64, 2, generator=g),
    }
    pool.load("x", state, LoraConfig(r=2, target_modules=["embed_tokens"]))
    attach_pool(model, pool)
    ids = torch.tensor([[1, 2, 2]])
    with pool.route(["x"]):
        y = model.model.embed_tokens(ids)
    y.sum().backward()
    grad = model.model.embed_tokens.weight.grad
    assert grad[2].unique().tolist() == [2.0] and grad[1].unique().tolist() == [1.0]
    plain = model.model.embed_tokens.weight[ids] + 4 * state[f"{key}A"].T[ids] @ state[f"{key}B"].T
    exact = (
        model.model.embed_tokens.weight.double()[ids]
        + 4 * state[f"{key}A"].double().T[ids] @ state[f"{key}B"].double().T
    )
    assert_within_budget(y.detach(), exact.detach(), plain.detach())


def test_what_does_not_fit_is_refused(tmp_path):
    saved = folders(tmp_path, tie_word_embeddings=False)["tokens"]
    key = r"embed_tokens\."
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[7, 7] += 1
    pool = AdapterPool(other, slots=1, pages=1, target_modules=TARGETS)
    with pytest.raises(ValueError, match=f"{key}base_layer.weight: is not the weight of the pool"):
        pool.load("x", saved)
    pool = AdapterPool(llama(), slots=1, pages=1, target_modules=TARGETS)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.lora_"
    linear = {f"{name}A.weight": torch.zeros(2, 100), f"{name}B.weight": torch.zeros(64, 2)}
    with pytest.raises(ValueError, match=f"{key}lora_A.weight: is for a linear layer"):
        pool.load("x", linear, config)
    half = {f"{name}embedding_A": torch.zeros(2, 100)}
    with pytest.raises(ValueError, match=r"embed_tokens\.lora.*B.*missing"):
        pool.load("x", half, config)
    without = AdapterPool(llama(), slots=1, pages=1)
    with pytest.raises(ValueError, match=f"{key}lora_embedding_A"):
        without.load("x", half | {f"{name}embedding_B": torch.zeros(64, 2)}, config)

    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model = llama()
    model.model.embed_tokens = Scaled(100, 64)
    with pytest.raises(TypeError, match=r"got Scaled, expected torch.nn.Embedding with no forward"):
        AdapterPool(model, slots=1, pages=1, target_modules=TARGETS)
