"""A whole model: one batch of many adapters against PEFT's model of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lora_kernels.nn import NF4Linear
from lora_kernels.serving import AdapterPool, attach_pool, generate_batch
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import VOCABULARY, llama

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"},
    "wide": {"r": 20, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "r": 8,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["o_proj", "gate_proj", "up_proj"],
        "rank_pattern": {r"layers\.0\.mlp\.up_proj": 1},
        "alpha_pattern": {"gate_proj": 3},
    },
}
ROWS = ["rslora", None, "plain", "wide", "plain", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind, as PEFT saves it."""
    made = {}
    for i, (name, options) in enumerate(OPTIONS.items()):
        peft = get_peft_model(llama(), LoraConfig(**options))
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, p in peft.named_parameters():
                if "lora_B" in key:
                    p.normal_(std=0.2, generator=g)
        made[name] = tmp_path_factory.mktemp(name)
        peft.save_pretrained(made[name])
    return made


def tokens(rows: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(1))


def served(model: Any, folders: dict[str, Path], **options: Any) -> AdapterPool:
    settings = {"slots": 3, "pages": 4, "max_rank": 32} | options
    pool = AdapterPool(model, **settings)
    for name, folder in folders.items():
        pool.register(name, folder)
    attach_pool(model, pool)
    return pool


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(folders, dtype):
    ids = tokens(len(ROWS))
    base = llama(dtype)(ids).logits
    model = llama(dtype)
    pool = served(model, folders)
    with pool.route(ROWS):
        mixed = model(ids).logits
    assert torch.equal(model(ids).logits, base)
    for name, folder in folders.items():
        rows = [i for i, row in enumerate(ROWS) if row == name]
        peft = PeftModel.from_pretrained(llama(dtype), folder).eval()
        plain = peft(ids).logits
        exact = peft.double()(ids).logits
        assert_within_budget(mixed[rows], exact[rows], plain[rows], name)
        assert not torch.equal(plain[rows], base[rows])
    nobody = [i for i, row in enumerate(ROWS) if not row]
    assert torch.equal(mixed[nobody], base[nobody])


@torch.no_grad()
def test_over_a_4_bit_base(folders):
    """Rows without adapter are the quantised model's, bit for bit; the others are not."""

    def quantised() -> Any:
        model = llama(torch.bfloat16)
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, child in list(block.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(block, name, NF4Linear.from_linear(child))
        return model

    ids = tokens(len(ROWS))
    base = quantised()(ids).logits
    model = quantised()
    pool = served(model, folders, dtype=torch.float32)
    with pool.route(ROWS):
        mixed = model(ids).logits
    for i, name in enumerate(ROWS):
        assert torch.equal(mixed[i], base[i]) == (not name)
    dense = llama(torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            weight = layer.weight.dequantize(torch.bfloat16)
            dense.get_submodule(name.removesuffix(".base")).weight.data = weight
    peft = PeftModel.from_pretrained(dense, folders["plain"]).eval()
    plain = peft(ids).logits
    exact = peft.double()(ids).logits
    rows = [i for i, row in enumerate(ROWS) if row == "plain"]
    assert_within_budget(mixed[rows], exact[rows], plain[rows])


class Characters:
    """A tokenizer whose tokens are the characters' own numbers, with what `generate_batch` asks."""

    pad_token_id: int | None = 0
    eos_token_id: int | None = 2

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) - ord(" ") + 3 for c in text] for text in texts]}

    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(int(i) + ord(" ") - 3) for i in ids if i > 2)


PROMPTS = ["to be", "a", "or not to be", "that is", "x y z", "the question"]


@torch.no_grad()
def alone(model: Any, prompt: str, **options: Any) -> Tensor:
    ids = torch.tensor(Characters()([prompt])["input_ids"])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
    )
    return out[0, ids.shape[1] :]


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_gives_the_tokens_of_each_adapter_alone(folders, beams):
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    model = llama()
    pool = served(model, folders)
    made = generate_batch(model, Characters(), PROMPTS, ROWS, **options)
    assert pool.stats().in_use == 0
    for i, name in enumerate(ROWS):
        single = PeftModel.from_pretrained(llama(), folders[name]).eval() if name else llama()
        expected = alone(single, PROMPTS[i], **options)
        assert made.tokens[i].tolist() == expected.tolist(), name
        assert made.texts[i] == Characters().decode(expected, True)
    # The adapters matter: the base alone says something else.
    base = generate_batch(model, Characters(), PROMPTS, [None] * len(ROWS), **options)
    assert [a.tolist() != b.tolist() for a, b in zip(made.tokens, base.tokens, strict=True)] == [
        bool(name) for name in ROWS
    ]


def test_generation_ends_each_row_at_its_own_end(folders):
    model = llama()
    served(model, folders)
    long = generate_batch(
        model, Characters(), PROMPTS, ROWS, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    end = int(long.tokens[0][3])
    cut = generate_batch(
        model, Characters(), PROMPTS, ROWS, max_new_tokens=8, do_sample=False, eos_token_id=end
    )
    for whole, part in zip(long.tokens, cut.tokens, strict=True):
        found = whole.tolist()
        stop = found.index(end) + 1 if end in found else len(found)
        assert part.tolist() == found[:stop]
    assert len(cut.tokens[0]) <= 4


def test_generation_refuses_what_it_cannot_do(folders):
    model = llama()
    with pytest.raises(ValueError, match="model: LlamaForCausalLM has no pool"):
        generate_batch(model, Characters(), ["a"], [None])
    pool = served(model, folders)
    nothing = Characters()
    nothing.pad_token_id = nothing.eos_token_id = None
    for prompts, adapters, tokenizer, options, message in (
        (["a", "b"], [None], Characters(), {}, "adapters: got 1, expected one for each of the 2"),
        ("a", [None], Characters(), {}, "adapters: got 1, expected .* prompts .a list"),
        (["a", ""], [None] * 2, Characters(), {}, r"prompts\[1\]: has no token"),
        (["a"], [None], nothing, {}, "tokenizer: has no padding token"),
        (["a"], [None], Characters(), {"num_return_sequences": 2}, "num_return_sequences: got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_batch(model, tokenizer, prompts, adapters, **options)
    with pytest.raises(KeyError, match="'nobody'"):
        generate_batch(model, Characters(), ["a"], ["nobody"])
    with pytest.raises(ValueError, match="model: is in training mode"):
        generate_batch(model.train(), Characters(), ["a"], [None])
    assert generate_batch(model.eval(), Characters(), [], []) == ([], [])
    assert pool.stats().in_use == 0
