"""Adapters on the output layer, tied to the embedding or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lora_kernels.serving import AdapterPool, attach_pool, detach_pool
from tests.adapters.models import llama
from tests.serving.peft_rows import assert_rows_are_peft, drawn_peft
from tests.serving.test_model import tokens

NAMES = {"head": ["lm_head"], "both": ["q_proj", "lm_head"], "body": ["q_proj"]}
ROWS = ["both", None, "head", "body", "head", ""]


def folders(root: Path, tied: bool, **options: Any) -> dict[str, Path]:
    made = {}
    for i, (name, targets) in enumerate(NAMES.items()):
        config = LoraConfig(r=3 + 5 * i, lora_alpha=9, target_modules=targets)
        peft = drawn_peft(llama(tie_word_embeddings=tied), config, "lora_B", seed=i)
        made[name] = root / name
        peft.save_pretrained(made[name], **options)
    return made


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{"save_embedding_layers": False}, {}], ids=["lora", "auto"])
def test_each_row_has_its_own_head(tmp_path, tied, options):
    saved = folders(tmp_path, tied, **options)
    model = llama(tie_word_embeddings=tied)
    before = model.state_dict()
    base = model(tokens(len(ROWS))).logits
    pool = AdapterPool(model, slots=3, pages=3, target_modules=["q_proj", "lm_head"])
    for name, folder in saved.items():
        pool.load(name, folder)
    assert attach_pool(model, pool)[-1] == "lm_head"
    with pool.route(ROWS):
        mixed = model(tokens(len(ROWS))).logits
    nobody = [i for i, row in enumerate(ROWS) if not row]
    assert torch.equal(mixed[nobody], base[nobody])
    assert_rows_are_peft(model, saved, ROWS, mixed, base, tie_word_embeddings=tied)
    detach_pool(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_another_head_under_the_adapter_is_refused(tmp_path):
    """A model trained over one head must not be served over another."""
    saved = folders(tmp_path, tied=False)["head"]
    other = llama(tie_word_embeddings=False)
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1
    pool = AdapterPool(other, slots=1, pages=1, target_modules=["lm_head"])
    key = r"lm_head\.base_layer\.weight"
    with pytest.raises(ValueError, match=f"{key}: is not the weight of the pool's model"):
        pool.load("head", saved)
    by_shape = AdapterPool({"lm_head": (64, 100)}, slots=1, pages=1)
    with pytest.raises(ValueError, match=f"{key}: not supported"):
        by_shape.load("head", saved)
