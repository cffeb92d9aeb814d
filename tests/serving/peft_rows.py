"""Adapters of PEFT's own making, and a mixed batch held against PEFT with each of them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_kernels.serving import generate_batch
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama
from tests.serving.test_model import PROMPTS, Characters, alone, tokens


@torch.no_grad()
def drawn_peft(model: nn.Module, config: LoraConfig, part: str, seed: int) -> PeftModel:
    """The model in PEFT, random numbers in every parameter whose name has `part` in it."""
    peft = get_peft_model(model, config)
    g = torch.Generator().manual_seed(seed)
    for key, p in peft.named_parameters():
        if part in key:
            p.normal_(std=0.2, generator=g)
    return peft


def assert_rows_are_peft(
    model: nn.Module,
    saved: Mapping[str, Path],
    rows: Sequence[str | None],
    mixed: Tensor,
    base: Tensor,
    **config: Any,
) -> None:
    """Each row's logits in the mixed batch, and the tokens generated for it, are those of a Llama
    (`config`) in PEFT with that row's adapter alone, and differ from the base model's."""
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    made = generate_batch(model, Characters(), PROMPTS, rows, **settings)
    for name, folder in saved.items():
        peft = PeftModel.from_pretrained(llama(**config), folder).eval()
        own = [i for i, row in enumerate(rows) if row == name]
        plain = peft(tokens(len(rows))).logits[own]
        for i in own:
            assert made.tokens[i].tolist() == alone(peft, PROMPTS[i], **settings).tolist()
        exact = peft.double()(tokens(len(rows))).logits[own]
        assert_within_budget(mixed[own], exact, plain, name)
        assert not torch.equal(plain, base[own])
